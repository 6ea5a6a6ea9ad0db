"""Write docs/claims.md from the claim files and the records of their runs: python tools/claims.py."""

from pathlib import Path

from arena.claims.page import page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "claims.md"

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
