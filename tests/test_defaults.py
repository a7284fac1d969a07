"""Nothing depends on torch's default dtype or device, which belong to whoever imports the package."""

import ast
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from spectralar import SpectralARPipeline, spectral
from spectralar.analysis import codecs, contributions, quality, statistics
from spectralar.inference.feedback import all_logits
from spectralar.quantizer import CodebookRevival
from tests.helpers import seed, tiny_pipeline, tiny_tokenizer

PACKAGE = Path(spectral.__file__).parent
FACTORIES = (
    "rand randn randint randperm zeros ones empty full tensor arange linspace logspace eye scalar_tensor as_tensor"
).split()


def calls_with_defaults(source: str) -> list[str]:
    """Calls of torch's factories that leave dtype or device to the defaults.

    Parameters and buffers of a model are made as torch makes them, so that `torch.device` and dtypes of
    `from_pretrained` work: inside `__init__` the device may be left out, inside `nn.Parameter` and `register_buffer`
    both. `as_tensor` keeps the dtype it is given.
    """
    found = []

    def visit(node: ast.AST, needed: set[str]) -> None:
        if isinstance(node, ast.FunctionDef):
            needed = {"dtype"} if node.name == "__init__" else {"dtype", "device"}
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("nn.Parameter", "self.register_buffer"):
                needed = set()
            if name.removeprefix("torch.") in FACTORIES and name.startswith("torch."):
                given = {keyword.arg for keyword in node.keywords}
                if None in given:  # **keywords, looked at below
                    given = {"dtype", "device"}
                if name == "torch.as_tensor":
                    given.add("dtype")
                if needed - given:
                    found.append(ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            visit(child, needed)

    visit(ast.parse(source), {"dtype", "device"})
    return found


def test_calls_are_found():
    calls = ["torch.zeros(3, device=d)", "torch.rand(3, dtype=t)", "torch.arange(3)"]
    assert calls_with_defaults("def f(): " + "; ".join(calls)) == calls
    assert not calls_with_defaults("def f(): torch.zeros(3, dtype=t, device=d); torch.zeros_like(x); x.new_zeros(3)")
    assert not calls_with_defaults("def __init__(self): nn.Parameter(torch.empty(3)); torch.arange(3, dtype=t)")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_factories_name_dtype_and_device(file):
    assert not calls_with_defaults(file.read_text(encoding="utf-8"))


# What comes out -------------------------------------------------------------------------------------------


@contextmanager
def defaults(kind):
    """Another default dtype, or a default device on which nothing can be computed."""
    if isinstance(kind, str):
        with torch.device(kind):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def flat(value):
    """All tensors and images in it, as lists."""
    if isinstance(value, torch.Tensor):
        return [value.dtype, str(value.device), value.tolist()]
    if isinstance(value, list | tuple):
        return [flat(item) for item in value]
    return value


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """With a codebook, with nested ones, and with finite scalars, of which one has thirds."""
    fsq = {"fsq_levels": [3, 5, 7], "codebook_size": 105, "codebook_dim": 3}
    configs = [{}, {"codebook_sizes": [4] * 6 + [32] * 6}, fsq]
    pipes = [tiny_pipeline(dtype=torch.float32, tokenizer=config) for config in configs]
    for pipe in pipes:
        pipe.folder = tmp_path_factory.mktemp("pipe")
        pipe.save_pretrained(pipe.folder)
    return pipes


def pipeline(pipe):
    """All that a pipeline gives."""
    x = torch.rand(2, 1, 20, 16, generator=seed(), dtype=torch.float32, device="cpu")
    codes = pipe.encode([x, (x[0, 0].numpy() * 255).astype("uint8")])
    lengths = torch.tensor([1, 5, 12], device="cpu")
    arguments = {"output_type": "pt", "guidance_schedule": "cosine", "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    out = pipe([0, "sneaker"], generator=[seed(3), seed(4)], **arguments)
    torch.manual_seed(5)  # used where there is no generator
    return [
        codes, out.images, out.codes, pipe.decode(codes, [1, 5, 12]), pipe.decode(codes.tolist(), lengths),
        pipe(1, prefix_codes=codes[:1, :4], output_type="pt").images,
        [(event.index, event.images) for event in pipe.stream(1, every=3, **arguments)],
        [image.tobytes() for image in pipe.decode(codes, output_type="pil")],
    ]  # fmt: skip


def analysis(pipe):
    """The functions beside it."""
    x = torch.rand(2, 3, 16, 16, generator=seed(), dtype=torch.float32, device="cpu") * 2 - 1
    tokenizer, transformer = pipe.tokenizer, pipe.transformer
    codes = tokenizer.encode(x[:, :1])
    marginals = statistics.code_marginals(codes, tokenizer.config.codebook_size)
    cutoffs, variances = tokenizer.cutoffs, spectral.dct2(x).square().mean(0)
    bits = codecs.prefix_bits(12, tokenizer.config.codebook_size)
    labels = torch.tensor([0, 1], device="cpu")
    with torch.device("cpu"):  # a model is made on the default device
        revival = CodebookRevival(tiny_tokenizer().float().quantizer)
    filled = revival.quantizer.codebook
    latents = torch.randn(2, 12, 8, generator=seed(), dtype=torch.float32, device="cpu")
    revival.fill(latents, 3)
    revival.update(codes % 32, latents, 4)
    return [
        spectral.radial_power_spectrum(x), spectral.band_energy(x, cutoffs), spectral.nested_targets(x, cutoffs),
        spectral.data_cutoffs(variances, bits), spectral.gaussian_psnr(variances, bits, cutoffs),
        contributions.token_contributions(tokenizer.decode(codes, [1, 5, 12]).detach(), cutoffs),
        contributions.influence_matrix(tokenizer, codes, marginals, draws=2), marginals,
        statistics.next_token_entropy(
            partial(all_logits, transformer, tokenizer), codes, labels, tokenizer.quantizer.codebook_sizes
        ),
        statistics.code_use(marginals), quality.psnr(x[:1], x[1:]), quality.ssim(x[:1], x[1:]),
        codecs.dct_truncation(x[0], 900), filled.detach(), revival.idle_steps,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("surface", [pipeline, analysis])
def test_results_are_the_same(pipes, surface, kind):
    for pipe in pipes:
        expected = flat(surface(pipe))
        with defaults(kind):
            assert flat(surface(pipe)) == expected


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64], ids=str)
def test_loading_gives_the_same_pipeline(pipes, kind):
    for pipe in pipes:
        expected = flat(pipeline(pipe))
        with defaults(kind):
            loaded = SpectralARPipeline.from_pretrained(pipe.folder)
        loaded.set_progress_bar_config(disable=True)
        assert flat(pipeline(loaded)) == expected
        assert loaded.tokenizer.quantizer.codebook.dtype == torch.float32
