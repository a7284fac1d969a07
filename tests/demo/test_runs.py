import base64
import io
import math
import threading
import time

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.demo.runs import SECONDS_A_MESSAGE, SECONDS_A_VISITOR, Run, Settings, parse_codes, stream

GOOD = ("Bag", 2, 7, 1.5, "linear", 1.0, 0, 1.0, None, "")
NAMES = (
    "class_label", "count", "seed", "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p",
    "num_tokens", "prefix_codes",
)  # fmt: skip


def picture(data_url):
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2])))


def checked(model, **changes):
    return Settings.checked(model, *[changes.get(name, value) for name, value in zip(NAMES, GOOD, strict=True)])


def test_settings_are_those_of_the_pipeline(model):
    settings = checked(model, prefix_codes="3, 4 5", count=2.0)
    assert settings.num_tokens == 12 and settings.prefix_codes == [3, 4, 5] and settings.count == 2
    assert settings.arguments()["prefix_codes"] == [[3, 4, 5]]
    assert checked(model).arguments()["prefix_codes"] is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class_label": None}, "choose a class first"),
        ({"count": 17}, "the number of images must be between 1 and 16, got 17"),
        ({"count": math.nan}, "the number of images must be a whole number"),
        ({"seed": None}, "the seed must be a whole number"),
        ({"seed": -1}, "the seed must be between 0"),
        ({"seed": math.inf}, "the seed must be a whole number"),
        ({"num_tokens": 13}, "the number of tokens must be between 1 and 12"),
        ({"top_k": 1.5}, "top-k must be a whole number between 0 and 32"),
        ({"temperature": "hot"}, "temperature must be a finite number"),
        ({"guidance_scale": math.nan}, "guidance must be a finite number"),
        ({"guidance_scale": 1e30}, "guidance must be a finite number"),
        ({"guidance_scale": 10**400}, "guidance must be a finite number"),
        ({"seed": 10**5000}, "the seed must be a whole number between 0 and"),
        ({"class_label": ["Bag"]}, "the class must be one of the names or ids"),
        ({"class_label": True}, "the class must be one of the names or ids"),
        ({"class_label": 4}, "class ids must be between 0 and 3"),
        ({"prefix_codes": "1 two"}, "whole numbers with spaces"),
        ({"prefix_codes": "1 32"}, "each fixed token must be between 0 and 31"),
        ({"prefix_codes": [1] * 12}, "nothing is left to sample"),
    ],
)
def test_wrong_settings_are_one_sentence(model, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked(model, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class_label": "Bagg"}, "did you mean 'Bag'"),
        ({"class_label": "7"}, "Class ids must be between 0 and 3"),
        ({"guidance_scale": 1e17}, "guidance_scale must be at most 1000"),
        ({"temperature": 1e-30}, "Temperature must be 0 .greedy. or between 0.001 and 1000"),
        ({"guidance_schedule": "sine"}, "guidance_schedule must be one of"),
        ({"top_p": 0}, "top_p must be above 0"),
    ],
)
def test_what_the_pipeline_refuses_reaches_the_visitor(model, changes, sentence):
    with pytest.raises(gr.Error, match=sentence):
        list(stream(model, checked(model, **changes)))


def test_codes_are_read_as_people_write_them():
    assert parse_codes(" 1, 2.3 4 ") == [1, 2, 3, 4] and parse_codes("") == []


@pytest.mark.parametrize("kind", ["model", "colour_model"])
def test_a_run_is_the_pipelines_stream(kind, request):
    model = request.getfixturevalue(kind)
    settings = checked(model)
    *_, run = stream(model, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    steps = list(
        model.pipe.stream("Bag", num_images_per_prompt=2, generator=generator, guidance_scale=1.5,
                          guidance_schedule="linear")
    )  # fmt: skip
    assert run.codes == steps[-1].codes.tolist()
    assert run.num_frames == len(run.value["frames"]) == len(run.value["codes"]) == model.num_tokens
    for strip, again, step in zip(run.value["frames"], run.frames(), steps, strict=True):
        images = [np.asarray(image, int) for image in step.images]
        np.testing.assert_allclose(np.asarray(picture(strip), int), np.concatenate(images, axis=1), atol=1)
        np.testing.assert_allclose(again.astype(int), np.stack(images), atol=1)
    assert [list(column) for column in zip(*run.value["codes"], strict=True)] == run.codes


def test_first_message_comes_before_the_model_and_the_first_frame_with_its_first_token(model):
    runs = stream(model, checked(model))
    first = next(runs).snapshot()
    assert first["busy"] and first["frames"] == []
    second = next(snapshot for run in runs if (snapshot := run.snapshot())["frames"])
    assert len(second["frames"]) == 1 and "tokens/s" in second["status"]
    assert first["frames"] == []  # a snapshot is not touched by what comes later
    runs.close()


def test_every_frame_of_a_given_prefix_is_there(model):
    *_, whole = stream(model, checked(model))
    prefix = whole.codes[1][:5]
    *_, run = stream(model, checked(model, prefix_codes=prefix, seed=8))
    assert run.num_frames == len(run.value["frames"]) == 12
    assert all(codes[:5] == prefix for codes in run.codes) and run.codes[0] != run.codes[1]
    for k in range(5):
        strip, expected = (np.asarray(picture(of.value["frames"][k]), int) for of in (run, whole))
        np.testing.assert_allclose(strip[:, :16], expected[:, 16:32], atol=1)


@pytest.mark.parametrize("how", ["left", "stopped", "stopped while waiting"])
def test_leaving_and_stopping_end_the_sampling(model, monkeypatch, how):
    allowed, steps = threading.Semaphore(how != "stopped while waiting"), []
    step = model.pipe.transformer.step

    def held(*arguments):
        assert allowed.acquire(timeout=120)
        steps.append(1)
        return step(*arguments)

    monkeypatch.setattr(model.pipe.transformer, "step", held)
    runs = stream(model, checked(model))
    run = next(runs)
    next(run for run in runs if run.num_frames or not steps)
    if how == "left":
        runs.close()
    else:
        run.finish(stopped=True)
        *_, last = runs
        assert last is run and last.value["status"].startswith("Stopped after") and not last.value["busy"]
    allowed.release(1)  # of the token that is being sampled
    deadline = time.monotonic() + 120
    while model.engine.num_requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(steps) <= 2


def test_messages_become_rarer_as_they_become_heavier(model, monkeypatch):
    monkeypatch.setattr("spectralar.demo.runs.BYTES_A_SECOND", 1.0)
    runs = list(run.snapshot() for run in stream(model, checked(model)))
    assert sorted({len(run["frames"]) for run in runs}) == [0, 1, 12]


def test_messages_become_rarer_the_more_visitors_there_are(model):
    run = Run(model, checked(model))
    while model.engine.num_requests:  # of the test before, which the engine drops at its next token
        time.sleep(0.01)
    assert run.interval() == SECONDS_A_MESSAGE
    model.engine._running.extend([None] * 40)
    try:
        assert run.interval() == 40 * SECONDS_A_VISITOR == 1.0
    finally:
        model.engine._running.clear()
