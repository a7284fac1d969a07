"""Files of a pipeline: what is saved, and every way to load it again."""

import copy
import json
import logging
import pickle
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.utils import filter_repo_objects

import spectralar
import spectralar.interface.files
from spectralar import SpectralARPipeline
from spectralar.demo.model import Model
from tests.helpers import CLASS_NAMES, tiny_pipeline, tiny_transformer

GENERIC = {"custom_pipeline": "pipeline", "trust_remote_code": True}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(dtype=torch.float32)


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def files(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def assert_same(loaded, pipe, dtype=torch.float32):
    """Equal bits in all weights, of a fresh type `dtype`, and equal images."""
    for name, model in pipe.components.items():
        saved, found = model.state_dict(), loaded.components[name].state_dict()
        assert saved.keys() == found.keys()
        assert all(found[key].dtype == dtype and torch.equal(found[key], saved[key].to(dtype)) for key in saved)
        assert not loaded.components[name].training
        assert {k: v for k, v in loaded.components[name].config.items() if k[0] != "_"} == {
            k: v for k, v in model.config.items() if k[0] != "_"
        }
    loaded.set_progress_bar_config(disable=True)
    out = loaded(["sneaker", 3], generator=torch.manual_seed(0), output_type="pt")
    assert out.images.dtype == dtype
    if dtype == torch.float32:
        expected = pipe(["sneaker", 3], generator=torch.manual_seed(0), output_type="pt")
        assert torch.equal(out.codes, expected.codes) and torch.equal(out.images, expected.images)


def test_what_is_saved(folder):
    assert files(folder) == [
        "model_index.json", "pipeline.py", "tokenizer/config.json",
        "tokenizer/diffusion_pytorch_model.safetensors", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    assert index["tokenizer"] == ["spectralar.tokenizer", "SpectralTokenizer"]
    assert index["transformer"] == ["spectralar.transformer", "SpectralARTransformer"]
    assert index["id2label"] == {str(i): name for i, name in CLASS_NAMES.items()}


def test_round_trip_is_exact_and_silent(pipe, folder, tmp_path, monkeypatch):
    messages = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda record: messages.append(record.getMessage()))
    logger = logging.getLogger("diffusers")
    monkeypatch.setattr(logger, "handlers", [handler])
    loaded = SpectralARPipeline.from_pretrained(folder)
    assert not messages
    assert_same(loaded, pipe)
    assert loaded.config.id2label == CLASS_NAMES and loaded.labels == pipe.labels
    loaded.save_pretrained(tmp_path / "again")
    for name in files(folder):
        if name.endswith(".safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_names_in_order_beyond_nine():
    """JSON sorts ids as strings, 10 before 2."""
    names = {i: f"class {i}" for i in range(12)}
    pipe = tiny_pipeline(id2label={str(i): names[i] for i in sorted(names, key=str)}, transformer={"num_classes": 12})
    assert list(pipe.config.id2label.items()) == list(names.items())
    assert pipe.class_names == list(names.values())


def test_a_pipeline_without_names(tmp_path):
    tiny_pipeline(id2label=None).save_pretrained(tmp_path)
    loaded = SpectralARPipeline.from_pretrained(tmp_path)
    assert loaded.config.id2label is None and loaded.labels == {}
    assert loaded.get_label_ids([0, 3]) == [0, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, folder, tmp_path, dtype):
    loaded = SpectralARPipeline.from_pretrained(folder, dtype=dtype)
    assert_same(loaded, pipe, dtype)
    loaded.save_pretrained(tmp_path / "half")
    again = SpectralARPipeline.from_pretrained(tmp_path / "half", dtype=dtype)
    for arguments in ({"output_type": "pt"}, {"output_type": "pt", "guidance_scale": 1.0}):
        first, second = (p([0, 1], generator=torch.manual_seed(0), **arguments) for p in (loaded, again))
        assert torch.equal(first.codes, second.codes) and torch.equal(first.images, second.images)


def test_the_generic_loader(pipe, folder):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        loaded = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **GENERIC)
        assert type(loaded) is SpectralARPipeline
        assert_same(loaded, pipe, dtype)


def test_the_generic_loader_where_nothing_is_imported(folder, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "spectralar"]:
        monkeypatch.delitem(sys.modules, name)
    loaded = DiffusionPipeline.from_pretrained(folder, **GENERIC)
    assert type(loaded).__name__ == "SpectralARPipeline" and type(loaded) is not SpectralARPipeline
    assert loaded(0, output_type="np").images.shape == (1, 16, 16, 1)
    for name in [name for name in sys.modules if name.split(".")[0] == "spectralar"]:
        monkeypatch.delitem(sys.modules, name)


def test_variants(pipe, tmp_path):
    half = SpectralARPipeline(**pipe.components, **pipe.parameters)
    half.save_pretrained(tmp_path, variant="fp16")
    assert "tokenizer/diffusion_pytorch_model.fp16.safetensors" in files(tmp_path)
    assert_same(SpectralARPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16), pipe, torch.float16)
    assert_same(DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", **GENERIC), pipe)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):  # the library's words
        SpectralARPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bf16"):
        SpectralARPipeline.from_pretrained(tmp_path, variant="bf16")


def test_pickles_where_they_are_asked_for(pipe, tmp_path):
    """As diffusers' PipelineTesterMixin does: written on request, and loaded where there is nothing else."""
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert [name for name in files(tmp_path) if "diffusion_pytorch_model" in name] == [
        "tokenizer/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.bin"
    ]  # fmt: skip
    assert_same(SpectralARPipeline.from_pretrained(tmp_path), pipe)
    assert_same(SpectralARPipeline.from_pretrained(tmp_path, use_safetensors=False), pipe)
    with pytest.raises(OSError, match="safetensors"):
        SpectralARPipeline.from_pretrained(tmp_path, use_safetensors=True)
    pipe.save_pretrained(tmp_path, variant="fp16", safe_serialization=False)
    assert_same(SpectralARPipeline.from_pretrained(tmp_path, variant="fp16"), pipe)
    with pytest.raises(ValueError, match="bf16"):
        SpectralARPipeline.from_pretrained(tmp_path, variant="bf16")


def test_pickles_beside_safetensors_are_not_looked_at(pipe, folder):
    for name in pipe.components:
        (folder / name / "diffusion_pytorch_model.bin").write_bytes(b"not a pickle")
    assert_same(SpectralARPipeline.from_pretrained(folder), pipe)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):  # one that was slipped in is no way around it
        SpectralARPipeline.from_pretrained(folder)


def test_the_page_loads_no_pickles(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        Model.load(tmp_path, "cpu")


def test_dtypes_of_components(folder):
    loaded = SpectralARPipeline.from_pretrained(folder, dtype={"tokenizer": torch.bfloat16, "default": torch.float16})
    assert loaded.tokenizer.dtype == torch.bfloat16 and loaded.transformer.dtype == torch.float16


def test_a_device_map(pipe, folder):
    for device_map in ("cpu", "balanced"):
        assert_same(SpectralARPipeline.from_pretrained(folder, device_map=device_map), pipe)


def test_shards(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "safe", max_shard_size="20KB")
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in files(tmp_path / "safe")
    assert_same(SpectralARPipeline.from_pretrained(tmp_path / "safe"), pipe)
    assert_same(DiffusionPipeline.from_pretrained(tmp_path / "safe", **GENERIC), pipe)
    pipe.save_pretrained(tmp_path / "pickles", max_shard_size="20KB", safe_serialization=False)
    assert_same(SpectralARPipeline.from_pretrained(tmp_path / "pickles"), pipe)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_have_a_state_of_their_own(pipe, copied):
    stream = pipe.stream(1, output_type="latent")
    next(stream)
    other = copied(pipe)  # while a run goes on
    assert_same(other, pipe)
    other._interrupt = True
    assert not pipe.interrupt and len(list(stream)) == pipe.num_timesteps - 1
    assert_same(SpectralARPipeline.from_pipe(other), pipe)


def test_a_loader_of_the_users_own_stays(pipe, folder, caplog):
    own = "class Mine: ...\n"
    (folder / "pipeline.py").write_text(own)
    pipe.save_pretrained(folder)
    assert (folder / "pipeline.py").read_text() == own
    assert "pipeline.py is not ours and stays as it is" in caplog.text
    caplog.clear()
    (folder / "pipeline.py").unlink()
    (folder / "pipeline.py").mkdir()
    pipe.save_pretrained(folder)
    assert "pipeline.py is not ours and stays as it is" in caplog.text
    caplog.clear()
    (folder / "pipeline.py").rmdir()
    for _ in range(2):
        pipe.save_pretrained(folder)
    assert "SpectralARPipeline" in (folder / "pipeline.py").read_text() and not caplog.text


def test_components_can_be_given(pipe, folder):
    other = tiny_transformer(seed=5)
    loaded = SpectralARPipeline.from_pretrained(folder, transformer=other, id2label={0: "cat"})
    assert loaded.transformer is other and loaded.labels == {"cat": 0}


@pytest.mark.parametrize("missing", ["tokenizer", "transformer"])
def test_half_a_pipeline_survives_saving(pipe, folder, tmp_path, missing):
    half = SpectralARPipeline.from_pretrained(folder, **{missing: None})
    half.save_pretrained(tmp_path)
    assert not (tmp_path / missing).exists()
    for loader, arguments in ((SpectralARPipeline, {}), (DiffusionPipeline, GENERIC)):
        loaded = loader.from_pretrained(tmp_path, **arguments)
        assert getattr(loaded, missing) is None and loaded.labels == pipe.labels
        loaded.set_progress_bar_config(disable=True)
        if missing == "transformer":
            x = torch.rand(2, 1, 16, 16)
            assert torch.equal(loaded.encode(x), pipe.encode(x))
        else:
            arguments = {"class_labels": "bag", "output_type": "latent"}
            codes = loaded(generator=torch.manual_seed(0), **arguments).codes
            assert torch.equal(codes, pipe(generator=torch.manual_seed(0), **arguments).codes)
    whole = SpectralARPipeline.from_pretrained(tmp_path, **{missing: getattr(pipe, missing)})
    assert_same(whole, pipe)


def test_optional_components_of_the_class_and_of_a_pipeline(pipe, folder):
    """diffusers' mixin takes away all that a pipeline names, and generates: of a whole one that is nothing."""
    assert SpectralARPipeline._optional_components == ["tokenizer", "transformer"] and pipe._optional_components == []
    half = SpectralARPipeline.from_pretrained(folder, transformer=None)
    assert half._optional_components == ["transformer"]


# The Hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, folder):
    """A Hub with one repository; what was asked of it."""
    asked = []

    def snapshot_download(repo_id, **arguments):
        asked.append((repo_id, arguments))
        return str(folder)

    monkeypatch.setattr(spectralar.interface.files, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_id_is_downloaded_first(pipe, hub):
    loaded = SpectralARPipeline.from_pretrained("owner/name", revision="v1", token="t", cache_dir="c")
    [(repo_id, arguments)] = hub
    assert repo_id == "owner/name"
    assert {name: arguments[name] for name in ("revision", "token", "cache_dir")} == {
        "revision": "v1", "token": "t", "cache_dir": "c",
    }  # fmt: skip
    assert_same(loaded, pipe)
    assert_same(SpectralARPipeline.from_pretrained("owner/name", dtype=torch.float16), pipe, torch.float16)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_what_is_needed_is_downloaded(hub, folder, pipe, variant):
    if variant:
        pipe.save_pretrained(folder, variant=variant)
    SpectralARPipeline.from_pretrained("owner/name", variant=variant)
    [(_, arguments)] = hub
    weights = "transformer/diffusion_pytorch_model"
    needed = ["model_index.json", "tokenizer/config.json", f"{weights}.safetensors.index.json"]
    needed += [f"{weights}.safetensors", f"{weights}-00001-of-00002.safetensors"]
    of_variant = [f"{weights}.fp16.safetensors", f"{weights}.fp16-00001-of-00002.safetensors"]
    others = ["README.md", "pipeline.py", f"{weights}.bin", "samples.png"]
    patterns = {name: arguments[name] for name in ("allow_patterns", "ignore_patterns")}
    taken = set(filter_repo_objects(needed + of_variant + others, **patterns))
    assert taken == set(needed + (of_variant if variant else []))


def test_pickles_of_the_hub_are_asked_for_by_name(hub, folder, pipe):
    pipe.save_pretrained(folder, safe_serialization=False)
    SpectralARPipeline.from_pretrained("owner/name", use_safetensors=False)
    SpectralARPipeline.from_pretrained("owner/name")
    assert [arguments["allow_patterns"] for _, arguments in hub] == [["*.json", "*.bin"], ["*.json", "*.safetensors"]]


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "../x", "a b", "", None, 5, b"x", Path("/no")])
def test_neither_folder_nor_hub_id(hub, name):
    with pytest.raises(ValueError, match="neither a folder nor a Hub id such as 'owner/name'"):
        SpectralARPipeline.from_pretrained(name)
    assert not hub


# The package ----------------------------------------------------------------------------------------------


def test_the_package_names_its_version():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert spectralar.__version__ == project["version"]
    models = {"SpectralARPipeline", "SpectralARTransformer", "SpectralTokenizer"}
    assert set(spectralar.__all__) == models | {"__version__"} and models <= set(dir(spectralar))
