"""Streamed Parquet: an order of windows, each row group read once and in time, exact resumption, what is refused."""

import os
import threading
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.train.data.test_sources import encoded
from train.configs.config import Config, DataConfig, TransformerStage
from train.data import streams
from train.data.decoding import ReadError
from train.data.images import load_images
from train.data.order import step_indices
from train.runs.clock import StepClock
from train.runs.engine import Run
from train.train_transformer import CodeSource

SIZE, BATCH_SIZE, WINDOW = 8, 5, 16
SHARDS = [(4, 4, 2), (4, 4), (4, 4, 4, 3), (4, 4, 4)]  # rows of the row groups of each file
N = sum(map(sum, SHARDS))  # 45
GROUPS = sum(map(len, SHARDS))  # 12


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def write_shard(path, greys: list, groups: tuple[int, ...], labels: list | None = None, feature=None) -> None:
    """Rows of images of one grey each, or of the bytes given instead; class = grey % 3."""
    feature = feature or datasets.ClassLabel(names=["ash", "elm", "oak"])
    images = [encoded((grey, grey, grey), (SIZE, SIZE)) if isinstance(grey, int) else grey for grey in greys]
    columns = {"image": images, "label": [grey % 3 for grey in greys] if labels is None else labels}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    table = datasets.Dataset.from_dict(columns, features=features).data.table
    with fsspec.open(str(path), "wb") as file, pq.ParquetWriter(file, table.schema) as writer:
        start = 0
        for rows in groups:
            writer.write_table(table.slice(start, rows), row_group_size=rows)
            start += rows


def write_split(folder, name: str, first: int = 0) -> None:
    start = first
    for number, groups in enumerate(SHARDS):
        greys = list(range(start, start + sum(groups)))
        write_shard(f"{folder}/{name}-{number:05}-of-{len(SHARDS):05}.parquet", greys, groups)
        start += sum(groups)


@pytest.fixture
def cfg(tmp_path):
    """Files of two splits: greys 0 to 44 to train on, 100 to 144 to measure on."""
    (tmp_path / "data").mkdir()
    write_split(tmp_path / "data", "train")
    write_split(tmp_path / "data", "test", 100)
    return DataConfig(source=str(tmp_path / "data"), image_size=SIZE, channels=1, decode="stream", window=WINDOW,
                      cache=str(tmp_path / "cache"))  # fmt: skip


@pytest.fixture
def reads(monkeypatch):
    """Numbers of the row groups that are read, in order."""
    numbers, read = [], streams.RowGroups.read
    monkeypatch.setattr(streams.RowGroups, "read", lambda self, g, rows: numbers.append(int(g)) or read(self, g, rows))
    return numbers


def greys(images) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def group_of(grey: int) -> int:
    return int(np.searchsorted(np.cumsum([rows for groups in SHARDS for rows in groups]), grey, side="right"))


def step(data, number: int, seed: int = 0) -> torch.Tensor:
    """The images of a step, as a training run gets them."""
    data.expect(BATCH_SIZE, seed, number)
    return data.gather(step_indices(len(data), BATCH_SIZE, seed, number, data.epoch_order))


# ------------------------------------------------------------------------------------------------ order


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(cfg):
    data = load_images(cfg, "train")
    per_epoch = N // BATCH_SIZE
    orders = {
        (seed, epoch): [g for i in range(per_epoch) for g in greys(step(data, epoch * per_epoch + i, seed))]
        for seed in (0, 1) for epoch in (0, 1, 2)
    }  # fmt: skip
    assert all(sorted(order) == list(range(N)) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) == 6
    again = load_images(cfg, "train")
    assert all(torch.equal(again.epoch_order(*key), data.epoch_order(*key)) for key in orders)


def test_images_are_shuffled_within_windows_of_whole_row_groups(cfg):
    images = load_images(cfg, "train").images
    order, later = images._order(0, 0), images._order(0, 1)
    assert sorted(np.concatenate(order.windows)) == list(range(GROUPS))
    assert [set(window) for window in order.windows] != [set(window) for window in later.windows]
    assert len(order.windows) == 3  # 45 images, 16 a window
    for window, start, stop in zip(order.windows, order.bounds[:-1], order.bounds[1:], strict=True):
        found = order.images[start:stop].tolist()
        assert {group_of(i) for i in found} == set(window.tolist())
        assert stop - start <= WINDOW
        neighbours = [a + 1 == b for a, b in zip(found, found[1:], strict=False)]
        assert sum(neighbours) < len(found) / 3  # in the order of the files, it would be three quarters


def test_a_balanced_epoch_is_streamed_in_windows_too(cfg, reads):
    """Class 1 has 3 of 45 images: what is drawn more than once comes so in its window."""
    labels = [1 if grey in (7, 20, 41) else 0 for grey in range(N)]
    start = 0
    for number, groups in enumerate(SHARDS):
        stop = start + sum(groups)
        path = f"{cfg.source}/train-{number:05}-of-{len(SHARDS):05}.parquet"
        write_shard(path, list(range(start, stop)), groups, labels[start:stop])
        start = stop
    cfg.class_balance = "even"
    data = load_images(cfg, "train")
    for epoch in (0, 1):
        order = data.images._order(0, epoch)
        assert torch.equal(order.images.sort().values, data.images._draw.chosen(0, epoch).sort().values)
        assert abs(int((data.labels[order.images] == 1).sum()) - N / 2) <= 1
        for window, start, stop in zip(order.windows, order.bounds[:-1], order.bounds[1:], strict=True):
            assert {group_of(i) for i in order.images[start:stop].tolist()} <= set(window.tolist())
    expected = [greys(step(data, i)) for i in range(2 * N // BATCH_SIZE)]
    assert [image for batch in expected for image in batch] == [
        image for epoch in (0, 1) for image in data.epoch_order(0, epoch).tolist()
    ]
    assert greys(step(load_images(cfg, "train"), 12)) == expected[12]


def test_a_run_that_starts_anywhere_sees_what_it_would_have_seen(cfg, reads):
    whole = load_images(cfg, "train")
    expected = [greys(step(whole, i)) for i in range(14)]
    whole.images._readers.shutdown()  # or it goes on reading ahead, beside what is counted
    reads.clear()
    resumed = load_images(cfg, "train")
    assert greys(step(resumed, 12)) == expected[12]
    held = resumed.images._held
    wait_until(lambda: sorted(reads) == sorted(held))
    assert len(held) < GROUPS  # no more than the windows it needs
    assert greys(step(resumed, 13)) == expected[13]
    assert greys(step(resumed, 2)) == expected[2]


def a_process(rank: int, accumulation: int, batch_size: int = 12, processes: int = 2) -> SimpleNamespace:
    """A training run as far as data goes, in one of some processes."""
    stage = TransformerStage(batch_size=batch_size, grad_accumulation=accumulation, label_dropout=0.0)
    accelerator = SimpleNamespace(process_index=rank, device=torch.device("cpu"))
    run = SimpleNamespace(stage=stage, accelerator=accelerator, micro_batch=batch_size // processes // accumulation,
                          dry=False, clock=StepClock(), to_device=lambda x: x)  # fmt: skip
    for name in ("micro_batches", "prefetch", "generator"):
        setattr(run, name, partial(getattr(Run, name), run))
    return run


@pytest.mark.parametrize("accumulation", [1, 3])
def test_slices_of_processes_make_up_the_batch_of_one(cfg, reads, accumulation):
    alone, seen = load_images(cfg, "train"), []
    runs = [(a_process(rank, accumulation), load_images(cfg, "train")) for rank in range(2)]
    fetches = [run.prefetch(data) for run, data in runs]
    for number in range(N // 12):
        slices = {slot: greys(images) for fetch in fetches for slot, images in fetch(number).items()}
        whole = sum((slices[slot] for slot in range(2 * accumulation)), [])
        assert whole == step_indices(N, 12, 0, number, alone.epoch_order).tolist()
        seen += whole
    assert len(set(seen)) == 36
    for fetch, (_, data) in zip(fetches, runs, strict=True):
        fetch._thread.shutdown()  # or it may be in the middle of a look-up
        assert data.images._held  # what was said to be needed stays


def test_labels_are_those_of_the_images_that_are_encoded_on_the_way(cfg, tmp_path):
    config = Config(data=cfg, train_transformer=TransformerStage(codes="on-the-fly", label_dropout=0.0, batch_size=12))
    encode = SimpleNamespace(
        device="cpu", encode=lambda x: ((x[:, 0, 0, :1] + 1) * 127.5).round().long()  # a code that is the grey level
    )  # fmt: skip
    config.train_transformer.grad_accumulation = 2
    run = a_process(0, accumulation=2, processes=1)
    source = CodeSource(config, run, encode)
    for number in range(5):
        for chosen, slot, slots in run.micro_batches(source, number):
            codes, labels = source.batch(chosen, slot, slots, number)
            assert codes[:, 0].tolist() == chosen.tolist() and torch.equal(labels, codes[:, 0] % 3)


# ------------------------------------------------------------------------------------------------ reading


def test_an_epoch_reads_each_row_group_once_and_holds_two_windows(cfg, reads):
    data = load_images(cfg, "train")
    most, per_epoch = 0, N // BATCH_SIZE
    for number in range(2 * per_epoch):
        step(data, number)
        order = data.images._order(0, number // per_epoch)
        most = max(most, len(data.images._held))
        if number == per_epoch - 1:
            assert set(range(GROUPS)) <= set(reads)
    # The end of the second epoch reads ahead of the third. What one window and the next share is not read again.
    assert max(Counter(reads).values()) <= 3 and len(reads) <= 2 * GROUPS + len(order.windows[0])
    assert most <= 2 * max(map(len, order.windows)) < GROUPS


def test_the_next_window_is_read_before_it_is_needed(cfg, reads, monkeypatch):
    """And not at once: in step with the training."""
    monkeypatch.setattr(streams, "READERS", 1)
    data = load_images(cfg, "train")
    order = data.images._order(0, 0)
    following, asked_for = set(order.windows[1].tolist()), []
    for number in range(int(order.bounds[1]) // BATCH_SIZE):  # those before the step that needs it
        step(data, number)
        asked_for.append(len(following & data.images._held.keys()))
    assert asked_for == sorted(asked_for) and 1 <= asked_for[0] < asked_for[-1] == len(following) > 2
    wait_until(lambda: following <= set(reads))
    assert not set(order.windows[2].tolist()) & set(reads)


def test_reading_happens_beside_the_training(cfg, monkeypatch):
    """No read of a later window holds up a step."""
    data, gate, read = load_images(cfg, "train"), threading.Event(), streams.RowGroups.read
    first = set(data.images._order(0, 0).windows[0].tolist())
    monkeypatch.setattr(
        streams.RowGroups, "read", lambda self, g, rows: (g in first or gate.wait(30)) and read(self, g, rows)
    )
    found = [greys(step(data, number)) for number in range(2)]
    assert len(sum(found, [])) == 2 * BATCH_SIZE
    gate.set()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_slices_in_order_read_each_row_group_once(cfg, reads, monkeypatch):
    monkeypatch.setattr(streams, "READERS", 2)
    data = load_images(cfg, "train")
    data.images[:3]
    assert sorted(data.images._held) == [0, 1, 2]  # the next ones are on their way
    found, most = [], 0
    for part in data.images.split(7):
        found += greys(part)
        most = max(most, len(data.images._held))
    assert found == list(range(N))
    assert sorted(reads) == list(range(GROUPS)) and most <= 4


def test_other_look_ups_leave_the_windows_where_they_are(cfg, reads):
    data = load_images(cfg, "train")
    step(data, 0)
    held = dict(data.images._held)
    wait_until(lambda: set(reads) == held.keys())
    reads.clear()
    chosen = torch.tensor([44, 0, 20, 0, *range(0, N, 4)])
    assert greys(data.images[chosen]) == chosen.tolist()
    assert data.images._held == held and set(reads) <= set(range(GROUPS)) - held.keys()
    reads.clear()
    step(data, 1)
    assert len(set(reads) & held.keys()) == 0


def test_images_to_measure_on_come_from_few_row_groups(cfg, monkeypatch):
    data = load_images(cfg, "eval")
    assert data.evenly(10).tolist() == [i * N // 10 for i in range(10)]
    monkeypatch.setattr(streams, "FEW", 3)
    chosen = data.evenly(6)
    assert len(chosen) == 6 and {group_of(i) for i in chosen.tolist()} == {0, 4, 8}
    assert len(data.evenly(1000)) == 4 + 4 + 3  # all that these have


def test_what_cannot_be_read_is_tried_again_and_never_taken_for_a_broken_image(cfg, monkeypatch):
    monkeypatch.setattr(streams, "PAUSES", (0.0, 0.0))
    data, read, failures = load_images(cfg, "train"), pq.ParquetFile.read_row_group, []

    def failing(*args, **options):
        if len(failures) < 2 or failures[0] == "for good":
            failures.append("once more")
            raise TimeoutError("no answer")
        return read(*args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", failing)
    assert greys(data.images[:4]) == [0, 1, 2, 3] and len(failures) == 2
    failures[0] = "for good"
    with pytest.raises(ReadError, match=r"train-00002-of-00004.parquet, row group 1, cannot be read: .*no answer"):
        data.images[torch.tensor([23])]


# ------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("limit", [0, 20])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_stream_has_the_images_and_labels_of_a_download(cfg, split, shared, limit):
    """In the same places, with a limit and where a tenth is held out too; and nothing is written."""
    cfg.limit, cfg.eval_split = limit, "train" if shared else "test"
    streamed = load_images(cfg, split)
    assert greys(step(streamed, 0, seed=3)) if len(streamed) >= BATCH_SIZE else True
    found = torch.cat(list(streamed.images.split(6)))
    assert not os.path.exists(cfg.cache) and not os.path.exists(datasets.config.HF_DATASETS_CACHE)
    cfg.decode = "once"
    kept = load_images(cfg, split)
    assert torch.equal(found, kept.images) and torch.equal(streamed.labels, kept.labels)
    assert streamed.class_names == kept.class_names == ["ash", "elm", "oak"]


def test_only_images_that_are_used_are_held(cfg):
    cfg.limit = 12
    data = load_images(cfg, "train")
    step(data, 0)
    assert sum(len(future.result()) for future in data.images._held.values()) <= 12


def test_broken_images_are_replaced_as_without_streaming(tmp_path, cfg):
    write_shard(tmp_path / "data" / "train-00001-of-00004.parquet", [10, b"junk", 12, 13, None, 15, 16, 17], (4, 4),
                [0, 1, 2, 0, 1, 2, 0, 1])  # fmt: skip
    found = greys(load_images(cfg, "train").images[:N])
    cfg.decode = "on-the-fly"
    assert found == greys(load_images(cfg, "train").images[:N])
    assert found[10:18] == [10, 17, 12, 13, 17, 15, 16, 17]
    write_shard(tmp_path / "data" / "train-00000-of-00004.parquet", [b""] * 10, (4, 4, 2), [2] * 10)
    cfg.source, cfg.eval_split, cfg.decode = str(tmp_path / "data" / "train-00000*"), "train", "stream"
    with pytest.raises(OSError, match="None of the 9 images of class 'oak' of .* can be read"):
        load_images(cfg, "train").images[:2]


@pytest.fixture
def memory():
    """A file system that is no disk."""
    fs = fsspec.filesystem("memory")
    yield "memory://stream"
    fs.rm("/stream", recursive=True)


@pytest.mark.parametrize("pattern", ["", "/*.parquet", "/t*-0000?-*.parquet"])
def test_files_may_be_anywhere(cfg, memory, pattern):
    for name in ("train", "test"):
        write_split(memory, name, 0 if name == "train" else 100)
    cfg.source = memory + pattern
    data = load_images(cfg, "train")
    assert sorted(g for i in range(9) for g in greys(step(data, i))) == list(range(N))
    assert greys(load_images(cfg, "eval").images[torch.tensor([0])]) == [100]
    cfg.decode = "once"
    with pytest.raises(ValueError, match="'memory://stream.*' is an address.*set data.decode=stream"):
        load_images(cfg, "train")


def test_a_single_file_is_shared_by_training_and_measuring(cfg, memory):
    write_shard(f"{memory}/pictures.parquet", list(range(30)), (8, 8, 8, 6))
    cfg.source = f"{memory}/pictures.parquet"
    parts = [sorted(greys(load_images(cfg, split).images[:30])) for split in ("train", "eval")]
    assert len(parts[1]) == 3 and sorted(parts[0] + parts[1]) == list(range(30))


def fake_hub(monkeypatch, files: dict, features=None):
    """The Hub as `datasets` shows it: addresses of files by split, and features."""
    data_files = {datasets.NamedSplit(name): paths for name, paths in files.items()}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=data_files), info=SimpleNamespace(features=features))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)


def test_parquet_on_the_hub_is_not_downloaded(cfg, memory, monkeypatch):
    files = {"train": f"{memory}/a.parquet", "valid": f"{memory}/b.parquet"}
    for first, path in enumerate(files.values()):
        write_shard(path, list(range(100 * first, 100 * first + 8)), (4, 4), [0, 1] * 4, datasets.Value("int64"))
    feature = datasets.ClassLabel(names=["yew", "fir"])
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    fake_hub(monkeypatch, {name: [path] for name, path in files.items()}, features)
    cfg.source, cfg.eval_split = "owner/trees", "valid"
    data = load_images(cfg, "eval")
    assert greys(data.images[:8]) == list(range(100, 108)) and data.class_names == ["yew", "fir"]
    fake_hub(monkeypatch, {name: [path] for name, path in files.items()})
    assert load_images(cfg, "eval").class_names == ["0", "1"]  # what the files say
    cfg.eval_split = "test"
    with pytest.raises(ValueError, match=r"no Parquet files of data.eval_split='test' but of 'train', 'valid'"):
        load_images(cfg, "eval")
    fake_hub(monkeypatch, {"train": [f"{memory}/a.zip"]})
    with pytest.raises(ValueError, match=r"owner/trees is not Parquet \('memory.*a.zip'\).*decode=on-the-fly"):
        load_images(cfg, "train")


def test_words_as_labels_are_numbered_by_the_training_split(cfg, memory):
    word = datasets.Value("string")
    write_shard(f"{memory}/train.parquet", [1, 2, 3, 4], (2, 2), ["oak", "elm", "oak", "ash"], word)
    write_shard(f"{memory}/test.parquet", [5, 6], (2,), ["oak", "elm"], word)
    cfg.source = memory
    data = load_images(cfg, "eval")
    assert data.labels.tolist() == [2, 1] and data.class_names == ["ash", "elm", "oak"]
    write_shard(f"{memory}/test.parquet", [5, 6], (2,), ["oak", "fig"], word)
    with pytest.raises(ValueError, match="1 of 2 images of .* have no class that the training split knows"):
        load_images(cfg, "eval")


@pytest.mark.parametrize("change, said", [
    ({"source": "fashion-mnist"}, "'fashion-mnist' is not Parquet.*set data.decode=on-the-fly"),
    ({"source": "{}/images"}, "images' is not Parquet.*set data.decode=on-the-fly"),
    ({"source": "{}/data/*.txt"}, "there is no such Parquet file"),
    ({"source": "{}/absent.parquet"}, "there is no such Parquet file"),
    ({"source": "{}/junk.parquet"}, "junk.parquet cannot be streamed, ArrowInvalid: .*: check data.source"),
    ({"source": "{}/empty.parquet"}, "empty.parquet has no rows for 'train'"),
    ({"source": "owner/absent"}, "owner/absent cannot be streamed, .*: check data.source"),
    ({"source": "gopher://x/y.parquet"}, "cannot be streamed, ValueError: Protocol not known: gopher"),
    ({"eval_split": "valid"}, "no Parquet files of data.eval_split='valid' but of 'data', 'test', 'train'|'test'"),
    ({"image_column": "picture"}, "has no column 'picture' but 'image', 'label': set data.image_column"),
    ({"image_column": "label"}, "column 'label' of .* holds no images but int64: set data.image_column"),
    ({"label_column": "image"}, "column 'image' of .* holds not one class an image but .*: set data.label_column"),
])  # fmt: skip
def test_what_cannot_be_streamed_is_said(tmp_path, cfg, change, said):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "0.png").write_bytes(encoded((0, 0, 0)))
    (tmp_path / "junk.parquet").write_bytes(b"no Parquet at all")
    write_shard(tmp_path / "empty.parquet", [], ())
    cfg = DataConfig(**{**vars(cfg), **{key: value.format(tmp_path) for key, value in change.items()}})
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        load_images(cfg, "train")
    assert "\n" not in str(caught.value)
