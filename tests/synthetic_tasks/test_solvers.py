"""Answers against plain Python that reads the printed tokens, written from the definitions alone."""

import functools
import itertools
import re

import synthetic_tasks


def product(group, left, right):
    if group == "z60":
        return str((int(left) + int(right)) % 60)
    if group == "a4xz5":
        (a, x), (b, y) = left.split("+"), right.split("+")
        return f"{product('a4', a, b)}+{(int(x) + int(y)) % 5}"
    return "".join(left[int(i) - 1] for i in right)  # (a b)(i) = a(b(i))


def word_problem(task, t):
    k = task.tokens_per_element
    assert all(x == "." for i, x in enumerate(t) if i % k)
    products = list(itertools.accumulate(t[::k], functools.partial(product, task.name)))
    if task.supervision == "final":
        return {len(t) - 1: products[-1]}
    return {k * i + k - 1: p for i, p in enumerate(products)}


def supervised(task, answers):
    last = len(answers) - 1
    return dict(enumerate(answers)) if task.supervision == "running" else {last: answers[last]}


def parity(task, t):
    return supervised(task, [str(t[: i + 1].count("1") % 2) for i in range(len(t))])


def even_pairs(task, t):
    changes = [sum(a != b for a, b in itertools.pairwise(t[: i + 1])) for i in range(len(t))]
    return supervised(task, [str(c % 2) for c in changes])


def cycle_navigation(task, t):
    steps = {".": 0, "+": 1, "-": -1}
    return supervised(
        task, [str(sum(steps[m] for m in t[: i + 1]) % task.n_positions) for i in range(len(t))]
    )


def state_recall(task, t):
    bits = list(itertools.takewhile(lambda x: x in "01", t))
    rest = t[len(bits) :]
    pointer = {rest[i]: int(rest[i + 1][1:]) for i in range(0, 2 * task.n_pointers, 2)}
    swaps = rest[2 * task.n_pointers : -2]
    assert len(swaps) == 2 * (task.n_swaps or len(bits)) and len(set(pointer.values())) == task.n_pointers
    for a, b in zip(swaps[::2], swaps[1::2], strict=True):
        assert a != b
        pointer[a], pointer[b] = pointer[b], pointer[a]
    return {len(t) - 1: bits[pointer[rest[-1]]]}


def arithmetic(task, t):
    assert t[-1] == "="
    return {len(t) - 1: str(eval(" ".join(t[:-1])) % task.modulus)}


def solve_equation(task, t):
    fits = [x for x in range(task.modulus) if eval(" ".join(t[:-2]), {"x": x}) % task.modulus == int(t[-1])]
    assert len(fits) == 1 and t.count("x") == 1 and t[-2] == "="
    return {len(t) - 1: str(fits[0])}


def majority(task, t):
    answers = []
    for i in range(len(t)):
        seen = t[: i + 1]
        best = max(map(seen.count, seen))
        winners = sorted({x for x in seen if seen.count(x) == best}, key=seen.index)
        answers.append(winners[0] if len(winners) == 1 or task.ties == "first" else None)
    return {i: a for i, a in supervised(task, answers).items() if a is not None}


def majority_count(task, t):
    best = max(map(t.count, set(t)))
    if task.form == "capped":
        return {len(t) - 1: str(min(best, task.n_classes))}
    margin = best - (len(t) - best)
    inside = [b for b in range(task.n_classes) if b * len(t) < margin * task.n_classes <= (b + 1) * len(t)]
    return {len(t) - 1: f"bin{inside[0]}"}


def anbn(task, t):
    letters, out = "abc"[: task.letters], {}
    text = "".join(t)
    if task.form == "next":
        for i, x in enumerate(t):
            if x != "a":
                follows = t[i + 1] if i + 1 < len(t) else None
                out[i] = "on" if follows == x else "over"
        runs = [(x, len(list(g))) for x, g in itertools.groupby(t)]
        assert "".join(x for x, _ in runs) == letters * task.n_segments
        sizes = [n for _, n in runs]
        assert all(sizes[i] == sizes[i - i % len(letters)] for i in range(len(sizes)))
        return out
    assert re.fullmatch("(" + "".join(f"{x}+" for x in letters) + "#)+", text)
    for i, x in enumerate(t):
        if x == "#":
            segment = text[:i].split("#")[-1]
            out[i] = "yes" if len({segment.count(x) for x in letters}) == 1 else "no"
    return out


PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def dyck(task, t):
    stack, out, sound = [], {}, True
    for i, x in enumerate(t):
        if x in PAIRS:
            stack.append(x)
        else:
            sound = sound and bool(stack) and PAIRS[stack[-1]] == x
            if stack:
                stack.pop()
            out[i] = stack[-1] if stack else "none"
    if task.form == "membership":
        return {len(t) - 1: "yes" if sound and not stack else "no"}
    assert sound and not stack
    return out


def palindrome(task, t):
    return {len(t) - 1: "yes" if t == t[::-1] else "no"}


def written(t, answers, blank="_"):
    start = t.index(blank)
    assert all(x == blank for x in t[start:])
    return {start + i: str(a) for i, a in enumerate(answers)}


def read(t):
    return t[: t.index("_")]


def missing_duplicate(task, t):
    n = (len(t) - 1) // 2
    hole = t.index("?")
    a, b = t[:n], t[n : 2 * n]
    assert all(x == y for i, (x, y) in enumerate(zip(a, b, strict=True)) if i != hole % n)
    return {2 * n: (b if hole < n else a)[hole % n]}


def stack(task, t):
    state = []
    for x in read(t):
        if x == "pop":
            state = state[:-1]
        else:
            state = [*state, x.lstrip("+")]
    return written(t, [*state[::-1], "end"])


def binary_addition(task, t):
    a, b = "".join(read(t)).split("+")
    total = int(a[::-1], 2) + int(b[::-1], 2)
    assert "1" in a and "1" in b
    return written(t, [*format(total, "b")[::-1], "end"])


def mqar(task, t):
    k = task.n_pairs
    if task.tokens_per_position == 2:
        cells = [x.split("/") for x in t]
        value = dict(cells[:k])
        return {i: value[key] for i, (key, _) in enumerate(cells) if i >= k and key in value}
    value = dict(zip(t[: 2 * k : 2], t[1 : 2 * k : 2], strict=True))
    assert len(value) == k == len(set(value.values()))
    return {i: value[t[i]] for i in range(2 * k, len(t), 2) if t[i] in value}


def variable_key(task, t):
    key, value, out = [], {}, {}
    for i, x in enumerate(t):
        if x == ".":
            assert not key
        elif x[0] == "v":
            value[tuple(key)], key = x, []
        else:
            key.append(x)
            complete = len(key) == 1 + int(key[0][1:]) % task.max_key_tokens
            if complete and len(value) == task.n_pairs:
                out[i], key = value[tuple(key)], []
    return out


def in_context(task, t):
    value, out = {}, {}
    for i in range(0, len(t), 2):
        if t[i][0] == "k":
            if t[i] in value:
                out[i] = value[t[i]]
            if i + 1 < len(t):
                assert value.setdefault(t[i], t[i + 1]) == t[i + 1]
    return out


def fuzzy(task, t):
    groups = re.findall(r"((?:k\d+ )+)((?:v\d+ )*)", " ".join(x for x in t if x != ".") + " ")
    value, out, i = {}, {}, t.count(".")
    for key, motif in groups:
        keys, values = key.split(), motif.split()
        for j, v in enumerate(value.get(key, [])):
            out[i + len(keys) - 1 + j] = v
        value.setdefault(key, values)
        i += len(keys) + len(values)
    return out


def memorization(task, t):
    half = task.vocab_size // 2
    assert len(set(task.facts)) == half - 1
    return {i: task.token_name(int(task.facts[int(t[i - 1][1:])])) for i in range(1, len(t), 2)}


def compression(task, t):
    end = t.index("!")
    assert sorted(int(x[1:]) for x in t[end + 1 :]) == list(range(end))
    return {i: t[int(x[1:])] for i, x in enumerate(t) if i > end}


def selective_copy(task, t):
    end = t.index("!")
    symbols = [x for x in t[:end] if x != "."]
    return {end + 1 + i: x for i, x in enumerate(symbols)}


def induction(task, t):
    assert t.count("!") == 2
    return {len(t) - 1: t[t.index("!") + 1]}


def phonebook(task, t):
    d, start = task.n_digits, len(t) - task.n_queries * task.n_digits
    book = {t[i]: t[i + 1 : i + 1 + d] for i in range(0, start, 1 + d)}
    assert len(book) == start // (1 + d)
    return {i + j: book[t[i]][j] for i in range(start, len(t), d) for j in range(d)}


def needle(task, t):
    kt, values = task.key_tokens, {}
    for i, x in enumerate(t):
        if x == "!":
            told = t[i + 2 + kt : i + 2 + kt + task.value_tokens]
            assert t[i + 1 + kt] == "is" and t[i + 2 + kt + task.value_tokens] == "."
            values.setdefault(tuple(t[i + 1 : i + 1 + kt]), []).append(told)
    assert len(values) == task.n_keys and all(len(v) == task.values_per_key for v in values.values())
    out = {}
    for i, x in enumerate(t):
        if x == "?":
            for j, v in enumerate(itertools.chain(*values[tuple(t[i + 1 : i + 1 + kt])])):
                out[i + kt + j] = v
    return out


def log(task, t, write, width=2):
    state, out = {}, {}
    for i in range(0, len(t), width):
        slot = t[i : i + width]
        if slot[0] == "?":
            out[i + 1] = state[slot[1]]
        elif slot[0] != ".":
            state[slot[0]] = write(state.get(slot[0]), slot[1])
    return out


def rebind(task, t):
    def write(old, new):
        assert task.name == "erase" or old != new
        return "none" if new == "unbind" else new

    return log(task, t, write)


def accumulate(task, t):
    return {i: str(v) for i, v in log(task, t, lambda old, new: (old or 0) + int(new)).items()}


def partial_update(task, t):
    state, out, width = {}, {}, task.n_fields + 1
    for i in range(0, len(t), width):
        head, *rest = t[i : i + width]
        if head == "?" and task.readout == "all":
            out.update({i + 1 + j: v for j, v in enumerate(state[rest[0]])})
        elif head == "?":
            out[i + 2] = state[rest[0]][int(rest[1][1:])]
        elif head != "." and rest[0][0] == "f":
            field = int(rest[0][1:])
            assert state[head][field] != rest[1]
            state[head][field] = rest[1]
        elif head != ".":
            state[head] = rest
    return out


def interference(task, t):
    width, value, out = task.key_tokens + 1, {}, {}
    for i in range(0, len(t), width):
        slot = t[i : i + width]
        if slot[0] == "?":
            out[i + width - 1] = value[tuple(slot[1:])]
        elif slot[0] != ".":
            value[tuple(slot[:-1])] = slot[-1]
    for a, b in itertools.combinations(value, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) == task.similarity
    return out


STRINGS = {
    "reverse": lambda x: x[::-1],
    "repetition": lambda x: x,
    "duplicate": lambda x: x + x,
    "odds_first": lambda x: x[::2] + x[1::2],
    "bucket_sort": lambda x: sorted(x, key=int),
    "set": lambda x: list(dict.fromkeys(x)),
}
ORACLES = {
    "parity": parity,
    "even_pairs": even_pairs,
    "cycle_navigation": cycle_navigation,
    "state_recall": state_recall,
    "mod_arithmetic": arithmetic,
    "mod_arithmetic_brackets": arithmetic,
    "solve_equation": solve_equation,
    **dict.fromkeys(("s3", "s4", "s5", "a5", "z60", "a4xz5"), word_problem),
    "majority": majority,
    "majority_count": majority_count,
    "anbn": anbn,
    "anbncn": anbn,
    "dyck": dyck,
    "palindrome": palindrome,
    "missing_duplicate": missing_duplicate,
    "stack": stack,
    "binary_addition": binary_addition,
    **{name: lambda task, t: written(t, STRINGS[task.name](read(t))) for name in STRINGS},
    "mqar": mqar,
    "mqar_stacked": mqar,
    "variable_key_mqar": variable_key,
    "in_context_recall": in_context,
    "noisy_recall": in_context,
    "fuzzy_recall": fuzzy,
    "memorization": memorization,
    "compression": compression,
    "selective_copy": selective_copy,
    "induction": induction,
    "phonebook": phonebook,
    **{name: needle for name in synthetic_tasks.names() if name.startswith("niah")},
    "rebind": rebind,
    "erase": rebind,
    "partial_update": partial_update,
    "interference": interference,
    "correction": rebind,
    "accumulate": accumulate,
    "capacity": rebind,
}


def test_every_task_has_an_oracle():
    assert set(ORACLES) == set(synthetic_tasks.names())


def test_answers_equal_plain_python(case):
    task, length = case
    lengths = {length, task.min_length, task.min_length + 3 * task.length_step, length + 8 * task.length_step}
    for some in lengths:
        if task.max_length and some > task.max_length:
            continue
        batch = task.sample(60, length=some, seed=1, split="valid")
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            if task.tokens_per_position == 1:
                printed = [task.token_name(x) for x in tokens]
            else:
                printed = ["/".join(task.token_name(x) for x in cell) for cell in tokens]
            answers = {i: task.class_name(y) for i, y in enumerate(targets) if y != -100}
            assert answers == ORACLES[task.name](task, printed), (some, printed)
