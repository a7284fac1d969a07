"""Any arguments whatever: the right result, as a plain slow computation has it, or a sentence that names the bad one.

2,000 sets of arguments from a fixed seed. Each argument is drawn with what it means: a plain value, or BAD.
"""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as given_
from hypothesis import strategies as st
from PIL import Image

from spectralar.sampling import MAX_GUIDANCE, MAX_TEMPERATURE, MIN_TEMPERATURE
from tests.helpers import seed, tiny_pipeline

N, K, SIDE, CLASSES = 5, 8, 8, {0: "Cat", 1: "Dog", 2: "Big dog, Hound"}
BAD = object()
SECONDS = 5  # of one processor, at most, for a call


def given(examples, **strategies):
    """`hypothesis.given`, the same examples in each run, on machines of any speed."""
    fixed = settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    return lambda test: fixed(given_(**strategies)(test))


@pytest.fixture(scope="module")
def pipe():
    """In float64: no two probabilities are so near each other that the order of sums decides."""
    small = {"hidden_size": 16, "num_layers": 2, "num_classes": 3}
    sizes = {"num_tokens": N, "codebook_size": K, "hidden_size": 16, "encoder_layers": 1, "decoder_layers": 1}
    return tiny_pipeline(1, SIDE, id2label=CLASSES, tokenizer=sizes, transformer=small)


# What arguments mean --------------------------------------------------------------------------------------


def among(**kinds):
    """One of the pairs (value, meaning); bad ones are drawn in one case of eight."""
    good, bad = ([pair for pair in kinds["pairs"] if (pair[1] is BAD) is which] for which in (False, True))
    return st.integers(0, 7).flatmap(lambda i: st.sampled_from(good if i else bad))


def pairs(good, bad):
    return among(pairs=[*good, *((value, BAD) for value in bad)])


def numbers(is_good, typical):
    """Real numbers of all kinds, typical ones more often; and things that are none."""
    kinds = st.sampled_from([float, np.float64, lambda x: torch.tensor(x, dtype=torch.float64), np.array])
    usual = st.tuples(st.sampled_from(typical), kinds).map(lambda pair: pair[1](pair[0]))
    any_float = st.floats() | st.sampled_from([1e38, 1e39, 1e-300, 10**400, 5e-324, math.nan, math.inf])
    nothing = st.sampled_from([None, "1", True, 1j, [1.0], torch.tensor([1.0]), np.ma.masked, object()])

    def meaning(value):
        if isinstance(value, bool) or not isinstance(value, int | float | Fraction | np.ndarray | torch.Tensor):
            return BAD
        if getattr(value, "ndim", 0) or isinstance(value, np.ma.MaskedArray):
            return BAD
        try:
            number = float(value)
        except OverflowError:
            return BAD
        return number if is_good(number) else BAD

    choice = st.integers(0, 15).flatmap(lambda i: usual if i > 1 else any_float if i else nothing)
    return choice.map(lambda value: (value, meaning(value)))


LABELS = pairs(
    [
        (1, [1]), ("cat", [0]), (" BIG dog ", [2]), ("Big dog, Hound", [2]), ([0, "hound"], [0, 2]),
        (range(2), [0, 1]), (torch.tensor([2, 1]), [2, 1]), (np.array([0]), [0]), ([[1], [0]], [1, 0]),
        (np.int16(2), [2]),
        (torch.tensor(1), [1]), (("dog", (2,)), [1, 2]), (np.array(["cat", "dog"]), [0, 1]),
    ],
    [
        [], None, 3, -1, 1.0, "cow", "", True, b"cat", [None], {"a": 1}, {1}, torch.tensor(1.5), math.nan, [[3]],
        np.array([True]), np.ma.masked_equal([1, 2], 1), 10**30, object(), [[], []], iter([1]),
        torch.zeros(1, device="meta"),
    ],
)  # fmt: skip
SAMPLING = {
    "guidance_scale": numbers(lambda w: 0 <= w <= MAX_GUIDANCE, [0, 1, 1.0, 2.5, 7, 1000]),
    "temperature": numbers(lambda t: t == 0 or MIN_TEMPERATURE <= t <= MAX_TEMPERATURE, [0, 1, 0.7, 1.5, 1e-3, 1e3]),
    "top_p": numbers(lambda p: 0 < p <= 1, [1, 0.9, 0.5, 0.05, 1e-300]),
    "top_k": pairs(
        [(k, int(k)) for k in (0, 1, 3, K, np.int8(2), torch.tensor(5), np.array(4))],
        [-1, K + 1, True, None, "3", 2.0, math.nan, [1], torch.tensor([1]), 10**30],
    ),
    "guidance_schedule": pairs(
        [(name, name) for name in ("constant", "linear", "cosine")], ["square", None, 5, ["linear"], np.array([1, 2])]
    ),
    "num_tokens": pairs(
        [(None, N)] + [(n, int(n)) for n in (1, 2, N, np.uint8(3), torch.tensor(4), np.array(2))],
        [0, N + 1, "3", True, 2.0, -1, [2], math.inf],
    ),
    "num_images_per_prompt": pairs(
        [(n, int(n)) for n in (1, 2, 3, np.int64(2), torch.tensor(2))], [0, -1, True, None, 1.5, "1", [1]]
    ),
    "output_type": pairs(
        [(kind, kind) for kind in ("pil", "np", "pt", "latent")], ["jpeg", None, 3, ["pt"], np.array(["pt", "np"])]
    ),
}
# Rows, as the batch is or not, tokens, the form they come in, and an element that is no code.
NO_CODES = st.sampled_from([K, -1, 0.5, None, "a", math.nan, True, 10**30])
PREFIX = st.none() | st.tuples(
    st.sampled_from(["one", "labels", "images", "images", "images", "other"]), st.integers(0, N), st.integers(0, 5),
    st.integers(0, 9).flatmap(lambda i: st.just(BAD) if i else NO_CODES), st.integers(0, 99),
)  # fmt: skip
FORMS = [list, tuple, np.array, torch.tensor, lambda rows: [torch.tensor(row) for row in rows],
         lambda rows: np.array(rows, np.uint8)]  # fmt: skip
GENERATOR = st.tuples(
    st.sampled_from(["none", "one", "one", "each", "each", "each"] * 3 + ["fewer", "number", "hole", "text"]),
    st.integers(0, 9),
)


def prefix_of(drawn, num_labels, batch, num_tokens):
    """`prefix_codes`, and as rows of the batch or BAD."""
    if drawn is None:
        return None, [[]] * batch
    kind, k, form, wrong, start = drawn
    rows = {"one": 1, "labels": num_labels, "images": batch, "other": batch + 1}[kind]
    codes = [[(start + 3 * row + 5 * i) % K for i in range(k)] for row in range(rows)]
    repeat = batch // rows if rows in (1, num_labels, batch) else 0
    meaning = [codes[row // repeat] for row in range(batch)] if repeat and k <= num_tokens else BAD
    if wrong is not BAD and k:
        codes[0][-1] = wrong
        return codes, BAD
    return FORMS[form](codes), meaning


def generators_of(drawn, batch):
    """`generator`, a function that makes the same numbers again, (B, N), or BAD."""
    kind, value = drawn
    torch.manual_seed(value)
    one = lambda g: torch.stack([torch.rand(N, generator=g) for _ in range(batch)])  # noqa: E731
    each = [seed(value + i) for i in range(batch)]
    return {
        "none": (None, lambda: one(seed(value))),
        "one": (seed(value), lambda: one(seed(value))),
        "each": (each, lambda: torch.stack([torch.rand(N, generator=seed(value + i)) for i in range(batch)])),
        "fewer": (each[:-1], BAD),
        "number": (value, BAD),
        "hole": ([*each[:-1], None], BAD),
        "text": ("seed", BAD),
    }[kind]


# The plain way --------------------------------------------------------------------------------------------


def pick(logits, u, temperature, top_k, top_p):
    """One token of logits (K,) by the definitions, in float64."""
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or K]
    p = np.exp((logits[order] - logits.max()) / temperature)
    p /= p.sum()
    before = np.concatenate([[0], p.cumsum()[:-1]])
    kept = before < top_p if top_p < 1 else np.ones(len(p), bool)
    kept[0] = True
    whole = np.zeros(K)
    whole[order[kept]] = p[kept]
    cdf = whole.cumsum()
    return int((cdf > cdf[-1] * u).argmax())


@torch.no_grad()
def plain_codes(pipe, labels, uniforms, prefix, m):
    """Codes by two passes over all tokens so far for each token: no cache, nothing joined."""
    model, codes = pipe.transformer, torch.zeros(len(labels), m["num_tokens"], dtype=torch.int64)
    k = len(prefix[0])
    codes[:, :k] = torch.tensor(prefix, dtype=torch.int64).view(len(labels), k)
    for t in range(k, m["num_tokens"]):
        progress = {"constant": 1.0, "linear": t / (N - 1), "cosine": (1 - math.cos(math.pi * t / (N - 1))) / 2}
        w = 1 + (m["guidance_scale"] - 1) * progress[m["guidance_schedule"]]
        cond = model(codes[:, :t], labels)[:, -1]
        uncond = model(codes[:, :t], torch.full_like(labels, len(CLASSES)))[:, -1]
        logits = (uncond + w * (cond - uncond)).numpy()
        for row in range(len(labels)):
            u = float(uniforms[row, t])
            codes[row, t] = pick(logits[row], u, m["temperature"], m["top_k"], m["top_p"])
    return codes


@torch.no_grad()
def assert_images(images, codes, kind, pipe):
    """Those of the codes, decoded one by one."""
    if kind == "latent":
        assert torch.equal(images, codes)
        return
    x = torch.cat([pipe.tokenizer.decode(row[None]) for row in codes])
    x = (x / 2 + 0.5).clamp(0, 1).numpy()
    if kind == "pil":
        assert all(image.mode == "L" for image in images)
        found = np.stack([np.asarray(image)[None] / 255 for image in images])
    else:
        found = images.numpy() if kind == "pt" else np.moveaxis(images, -1, 1)
    assert np.abs(found - x).max() < (0.003 if kind == "pil" else 1e-5)


def answer(call, bad):
    """What `call` gives, or None after a sentence about one of what is bad; whatever else it does is a failure."""
    begin = time.thread_time()
    try:
        result = call()
    except (ValueError, TypeError) as error:
        assert bad, f"refused without a reason: {error}"
        text = str(error)
        assert any(name in text for name in bad), f"none of {bad} is named: {text}"
        assert text.endswith((".", "?")) and "\n" not in text.strip() or "masked" in text, text
        return None
    finally:
        assert time.thread_time() - begin < SECONDS
    assert not bad, f"{bad} taken as if they were good"
    return result


NAMES = {"class_labels": "class"}  # "class ids must be ..", "no class is named .."


def arguments_of(drawn, labels, prefix, generator):
    """Keyword arguments, what they mean, and the names of bad ones."""
    values = {name: value for name, (value, _) in drawn.items()} | {"class_labels": labels[0]}
    meant = {name: meaning for name, (_, meaning) in drawn.items()} | {"class_labels": labels[1]}
    sizes = [meant["class_labels"], meant["num_images_per_prompt"], meant["num_tokens"]]
    known = not any(size is BAD for size in sizes)
    ids, per_label, num_tokens = sizes if known else ([0], 1, N)
    batch = len(ids) * per_label
    values["prefix_codes"], meant["prefix_codes"] = prefix_of(prefix, len(ids), batch, num_tokens)
    values["generator"], meant["generator"] = generators_of(generator, batch)
    bad = [NAMES.get(name, name) for name, meaning in meant.items() if meaning is BAD]
    return values, meant, bad


def expected_codes(pipe, meant):
    labels = torch.tensor(meant["class_labels"]).repeat_interleave(meant["num_images_per_prompt"])
    return plain_codes(pipe, labels, meant["generator"](), meant["prefix_codes"], meant)


# The surface ----------------------------------------------------------------------------------------------


@given(1200, drawn=st.fixed_dictionaries(SAMPLING), labels=LABELS, prefix=PREFIX, generator=GENERATOR)
def test_calls(pipe, drawn, labels, prefix, generator):
    values, meant, bad = arguments_of(drawn, labels, prefix, generator)
    out = answer(lambda: pipe(**values), bad)
    if out is not None:
        assert torch.equal(out.codes, expected_codes(pipe, meant)) and out.codes.dtype == torch.int64
        assert_images(out.images, out.codes, meant["output_type"], pipe)


@given(
    400, drawn=st.fixed_dictionaries(SAMPLING), labels=LABELS, prefix=PREFIX, generator=GENERATOR,
    every=pairs([(n, int(n)) for n in (1, 2, 3, 50, np.int8(4))], [0, -1, 1.5, None, True, "1"]),
)  # fmt: skip
def test_streams(pipe, drawn, labels, prefix, generator, every):
    values, meant, bad = arguments_of(drawn, labels, prefix, generator)
    bad += ["every"] if every[1] is BAD else []
    stream = answer(lambda: pipe.stream(every=every[0], **values), bad)
    if stream is None:
        return
    codes, n, k = expected_codes(pipe, meant), meant["num_tokens"], len(meant["prefix_codes"][0])
    events = list(stream)
    indices = {i for i in range(k + 1, n + 1) if i % every[1] == 0} | {n} | ({k} if k else set())
    assert [event.index for event in events] == sorted(indices)
    for event in events:
        assert torch.equal(event.codes, codes[:, : event.index])
        assert_images(event.images, event.codes, meant["output_type"], pipe)


ROWS = [[1, 2, 3], [4, 5, 7]]
CODES = pairs(
    [(ROWS, ROWS), (np.array(ROWS, np.uint16), ROWS), (torch.tensor(ROWS, dtype=torch.int8), ROWS),
     (tuple(ROWS), ROWS), ([torch.tensor(row) for row in ROWS], ROWS), ([range(3)], [[0, 1, 2]]),
     (np.array(ROWS, ">i8"), ROWS)],
    [[1, 2], [[1], [2, 3]], [[8]], [[-1]], [[1.0]], [[True]], [[None]], "12", None, 5, [[]], [[1] * 6],
     torch.tensor([[1j]]), np.ma.masked_equal(ROWS, 1), torch.zeros(1, 2), [[10**30]], {1: 2}, b"12",
     np.array([["1"]]), object()],
)  # fmt: skip
LENGTHS = pairs(
    [(None, 3), (1, 1), (np.int8(2), 2), (torch.tensor(3), 3), ([1, 3], [1, 3]), (range(1, 3), [1, 2]), ((2,), [2])],
    [0, 4, True, "2", 1.0, [], [0], [4], [True], [None], [1.5], torch.tensor([1] * 5), {1}, object(), b"1"],
)


KINDS = pairs([("pt", "pt"), ("np", "np")], ["latent", "jpeg", None, 3, ["pt"]])


@given(200, codes=CODES, lengths=LENGTHS, kind=KINDS)
def test_decoding(pipe, codes, lengths, kind):
    meant = {"codes": codes[1], "num_tokens": lengths[1], "output_type": kind[1]}
    frames = answer(lambda: pipe.decode(codes[0], lengths[0], kind[0]), [n for n, m in meant.items() if m is BAD])
    if frames is None:
        return
    rows = torch.tensor(codes[1])
    frames = torch.from_numpy(np.moveaxis(frames, -1, -3)) if kind[1] == "np" else frames
    several = isinstance(lengths[1], list)
    for place, k in enumerate(lengths[1] if several else lengths[1:]):
        assert_images(frames[:, place] if several else frames, rows[:, :k], "pt", pipe)


RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)


def grey(kind):
    """The ramp from black to white in some form, with what is wrong with it, if anything."""
    f32, u8 = RAMP.astype(np.float32), (RAMP * 255).round().astype(np.uint8)
    hole, above, negative = f32.copy(), f32.copy(), f32.copy()
    hole[2, 2], above[2, 2], negative[2, 2] = np.nan, 1.02, -0.02
    pil, i32, tensor = Image.fromarray, u8.astype(np.int32), torch.from_numpy(f32)[None]
    good = {
        "F": pil(f32), "F255": pil(f32 * 255), "L": pil(u8), "u8": u8, "floats": RAMP, "torch": tensor,
        "list": [pil(u8)], "I16": pil(u8.astype(np.uint16) * 257), "I": pil(i32), "half": f32.astype(np.float16),
        "bf16": tensor.bfloat16(),
    }  # fmt: skip
    bad = {
        "nan": pil(hole), "above": pil(above), "negative": pil(negative), "nans": hole, "aboves": above,
        "F65535": pil(f32 * 65535), "F-1": pil(f32 * 2 - 1), "I-1": pil(i32 - 1), "I256": pil(i32 + 1), "none": None,
        "text": "x.png", "empty": [], "masked": np.ma.masked_less(RAMP, 0.5), "ints": u8.astype(np.int64),
        "bools": u8 > 3, "flat": RAMP[0], "complex": RAMP + 1j, "5 channels": np.zeros((8, 8, 5)),
        "object": object(), "holes": [u8, None], "zero": np.zeros((0, 8, 8, 1)),
    }  # fmt: skip
    return (good[kind], None) if kind in good else (bad[kind], BAD)


GREY = "F F255 L u8 floats torch list I16 I half bf16"
NOT_GREY = (
    "nan above negative nans aboves F65535 F-1 I-1 I256 "
    "none text empty masked ints bools flat complex object holes zero"
)


@given(200, kind=st.sampled_from([*GREY.split(), *NOT_GREY.split(), "5 channels"]))
def test_encoding(pipe, kind):
    images, meaning = grey(kind)
    codes = answer(lambda: pipe.encode(images), ["image", "pixels"] if meaning is BAD else [])
    if codes is not None:
        exact = pipe.tokenizer.latents(torch.from_numpy(RAMP)[None, None] * 2 - 1).detach()
        latents = pipe.tokenizer.quantizer.lookup(codes)
        # As near to the exact latents as the nearest entries, up to the rounding of 8 bits.
        nearest = pipe.tokenizer.quantizer.lookup(pipe.tokenizer.quantizer.encode(exact))
        unit = torch.nn.functional.normalize(exact, dim=-1)
        assert ((latents * unit).sum(-1) >= (nearest * unit).sum(-1) - 0.02).all()
