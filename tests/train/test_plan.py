"""The formulas of the plan against what is counted: operations and kept bytes of the presets' own models, a peak."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from spectralar import SpectralARTransformer, SpectralTokenizer, spectral
from spectralar.inference.feedback import expected_latents
from spectralar.tokenizer import encoder_mask
from train.benchmark.measure import count_flops
from train.configs.reading import available_presets, load_config
from train.objectives.adversarial import PatchDiscriminator
from train.objectives.losses import make_perceptual_loss
from train.objectives.nested import nested_loss
from train.objectives.next_token import middle_positions, next_token_loss
from train.plan import main, make_models, plan_stages
from train.runs import optimizers
from train.runs.costs import PERCEPTUAL_FLOPS, extra_flops
from train.runs.engine import make_ema
from train.runs.optimizers import make_optimizer

# The presets with fewer layers, which the formulas know as a number: counting takes seconds, not minutes.
SHORT = ["tokenizer.encoder_layers=3", "tokenizer.decoder_layers=2", "transformer.num_layers=2"]
CLASSES, IMAGES = 10, 512  # so many that what is done once a batch does not show


@pytest.fixture(autouse=True)
def no_fake_tensor_stays():
    """What is kept between calls was made of tensors without storage: nothing for the tests that come after."""
    yield
    for kept in (spectral._dct_matrix, spectral._dct_matrix_cpu, encoder_mask):
        kept.cache_clear()


class Feedback(torch.nn.Module):
    """`expected_latents` as a module: the memory tracker wants one around others that are called twice."""

    def forward(self, *arguments) -> torch.Tensor:
        return expected_latents(*arguments)


class Measured:
    """Both models of a preset, for `images` images, and their losses; a copy of what a training step computes."""

    def __init__(self, config, images: int, checkpointing: bool) -> None:
        data, c = config.data, config.tokenizer
        tokenizer, transformer = make_models(config, CLASSES)
        self.tokenizer = SpectralTokenizer.from_config(tokenizer.config).train()
        self.transformer = SpectralARTransformer.from_config(transformer.config).train()
        self.tokenizer.quantizer.requires_grad_(c.encoder_layers > 0)  # as stage 1 does
        if checkpointing:
            self.tokenizer.enable_gradient_checkpointing()
            self.transformer.enable_gradient_checkpointing()
        self.images = torch.rand(images, data.channels, data.image_size, data.image_size)
        frames = 1 + config.train_tokenizer.prefixes_per_step
        self.lengths = torch.full((images, frames), c.num_tokens)
        self.codes = torch.zeros(images, c.num_tokens, dtype=torch.long)
        self.labels = torch.zeros(images, dtype=torch.long)
        self.half = config.train_tokenizer.mixed_precision != "no"
        self.feedback = config.transformer.decoder_feedback

    def loss(self, stage: str) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            if stage == "tokenizer":
                frames, quantized, _ = self.tokenizer(self.images, self.lengths)
            elif self.feedback:
                at = middle_positions(self.codes.shape[1])
                expected = Feedback()(self.tokenizer, self.codes, at)
                logits = self.transformer(self.codes[:, :-1], self.labels, expected, torch.tensor(at))
                return next_token_loss(logits, self.codes[:, at]).mean()
            else:
                return next_token_loss(self.transformer(self.codes[:, :-1], self.labels), self.codes).mean()
        cutoffs = torch.tensor((1, *self.tokenizer.cutoffs))
        losses = nested_loss(frames, self.images, self.lengths, cutoffs)
        return losses["full"] + losses["prefix"] + quantized.codebook_loss + quantized.commitment_loss


def load(preset: str, *overrides: str):
    config = load_config(preset, [*SHORT, *overrides])
    for stage in (config.train_tokenizer, config.train_transformer):
        stage.batch_size, stage.codes, stage.optimizer = IMAGES, "stored", "adamw"
    return config


@pytest.mark.parametrize("preset, checkpointing", [
    ("fashion-mnist-32", True), ("tiny-imagenet-64", False), ("imagenet-256-d16", True),
])  # fmt: skip
def test_operations_are_those_counted(preset, checkpointing):
    operations_are_those_counted(load(preset), checkpointing)


@pytest.mark.parametrize("settings", [
    "tokenizer.encoder_layers=0",
    "tokenizer.encoder_layers=1",
    "tokenizer.encoder_layers=0 transformer.decoder_feedback=false",
    "tokenizer.encoder_layers=1 transformer.decoder_feedback=false transformer.codebook_dim=0",
    "tokenizer.encoder_layers=1 transformer.decoder_feedback=false tokenizer.spectral_shortcut=false",
])  # fmt: skip
def test_operations_with_a_shortcut_and_what_is_told_to_the_transformer(settings):
    operations_are_those_counted(load("products-64", *settings.split()), checkpointing="encoder_layers=0" in settings)


def operations_are_those_counted(config, checkpointing: bool) -> None:
    config.train_tokenizer.perceptual = config.train_tokenizer.adversarial = ""
    for stage in (config.train_tokenizer, config.train_transformer):
        stage.gradient_checkpointing = checkpointing
    plans = {plan.name: plan for plan in plan_stages(config, 1, CLASSES)}
    with FakeTensorMode(allow_non_fake_inputs=True):  # operations are recorded, nothing is computed
        measured = Measured(config, IMAGES, checkpointing)
        for name, plan in plans.items():
            counted = count_flops(lambda name=name: measured.loss(name).backward())
            assert plan.flops == pytest.approx(counted, rel=1e-3), name
            assert plan.parameters == sum(p.numel() for p in getattr(measured, name).parameters())


def test_muon_costs_what_is_counted(monkeypatch):
    monkeypatch.setattr(optimizers, "fast_dtype", lambda device: torch.bfloat16)  # as on what is planned for
    config = load("fashion-mnist-32")
    adamw = plan_stages(config, 1, CLASSES)
    for stage in (config.train_tokenizer, config.train_transformer):
        stage.optimizer = "muon"
    one, three = (plan_stages(config, devices, CLASSES) for devices in (1, 3))
    for plain, plan, devices in zip(adamw, one, three, strict=True):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = getattr(Measured(config, 1, False), plan.name)
            optimizer = make_optimizer(model, plan.stage)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            counted = count_flops(optimizer.step)
            moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
        assert plan.flops - plain.flops == pytest.approx(counted, rel=1e-6) and counted > 0
        assert devices.flops - plain.flops == pytest.approx(3 * counted, rel=1e-6)
        assert plan.state_bytes() == pytest.approx(8 * plan.parameters + moments + 4 * plan.fixed, rel=1e-3)


@pytest.mark.parametrize("shortcut, layers", [("false", 3), ("true", 0), ("true", 1)])
def test_codes_encoded_on_the_way_cost_the_encoder(shortcut, layers):
    settings = f"tokenizer.spectral_shortcut={shortcut}", f"tokenizer.encoder_layers={layers}"
    config = load("fashion-mnist-32", *settings)
    stored = plan_stages(config, 1, CLASSES)[1].flops_per_image
    config.train_transformer.codes = "on-the-fly"
    tokenizer = SpectralTokenizer.from_config(make_models(config, CLASSES)[0].config)
    counted = count_flops(lambda: tokenizer.encode(torch.rand(1, 1, 32, 32)))
    assert plan_stages(config, 1, CLASSES)[1].flops_per_image - stored == pytest.approx(counted, rel=1e-6)


def test_networks_that_judge_cost_what_is_counted():
    config = load("tiny-imagenet-64", "train_tokenizer.perceptual=efficientnet-lite0")
    size = config.train_tokenizer.perceptual_size
    distance = make_perceptual_loss("efficientnet-lite0", size)
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    counted = count_flops(lambda: distance(x, x.detach()).sum().backward())
    assert extra_flops(config) == pytest.approx(counted, rel=0.01)
    assert PERCEPTUAL_FLOPS["lpips-vgg"] == pytest.approx(2 * 15.35e9, rel=0.01)  # VGG-16 without its classifier

    config = load("tiny-imagenet-64", "train_tokenizer.perceptual=", "train_tokenizer.adversarial=patchgan")
    network = PatchDiscriminator(3, config.train_tokenizer.discriminator_width)
    counted = count_flops(lambda: network(x[:1].detach()))
    assert extra_flops(config) == pytest.approx(8 * counted, rel=1e-6)


def peak_bytes(measured: Measured, name: str, stage) -> int:
    """The largest sum of all tensors in two steps, with Adam's moments and the average."""
    model, quantizer = getattr(measured, name), measured.tokenizer.quantizer
    if not quantizer.codebook.requires_grad:  # the tracker hangs hooks on all parameters: this one as a buffer
        codebook = quantizer.codebook.detach()
        del quantizer.codebook
        quantizer.register_buffer("codebook", codebook)
    optimizer, ema = make_optimizer(model, stage), make_ema(list(model.parameters()), stage.ema_decay)
    tracker = MemTracker()
    tracker.track_external(measured.tokenizer, model, optimizer, *ema.shadow_params)
    with tracker:
        for step in range(2):
            measured.loss(name).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0:  # without moments
                tracker.reset_mod_stats()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"]


@pytest.mark.parametrize("preset, checkpointing, precision", [
    ("fashion-mnist-32", False, "no"), ("tiny-imagenet-64", True, "bf16"), ("imagenet-256-d16", False, "bf16"),
    ("products-64", False, "no"),
])  # fmt: skip
def test_memory_is_that_of_the_peak(preset, checkpointing, precision):
    config = load(preset)
    for stage in (config.train_tokenizer, config.train_transformer):
        stage.gradient_checkpointing, stage.mixed_precision, stage.batch_size = checkpointing, precision, 8
    for plan in plan_stages(config, 1, CLASSES):
        with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without storage, of the sizes that they would have
            peak = peak_bytes(Measured(config, 8, checkpointing), plan.name, plan.stage)
        assert plan.memory() == pytest.approx(peak, rel=0.12), plan.name
        assert plan.passing_bytes() > 0.1 * peak


def test_more_devices_have_less_to_hold_and_to_do():
    config = load_config("imagenet-256-d16")
    one, many = (plan_stages(config, devices, 1000) for devices in (1, 128))
    for alone, shared in zip(one, many, strict=True):
        assert shared.flops == alone.flops
        assert shared.hours(989, 0.35) == pytest.approx(alone.hours(989, 0.35) / 128)
        assert shared.images_at_once == alone.images_at_once / 128
        fixed = 4 * (one[0].parameters if alone is one[1] else 0)  # the tokenizer that stage 2 holds
        assert alone.state_bytes() == 18 * alone.parameters + fixed  # bf16 copies beside float32
        assert shared.state_bytes() == 22 * alone.parameters + fixed
        assert shared.state_bytes(128) == (16 / 128 + 2) * alone.parameters + fixed
        seconds = alone.flops * alone.stage.steps / (989e12 * 0.35)
        assert alone.hours(989, 0.35) == pytest.approx(seconds / 3600)
    assert one[1].parameters == pytest.approx(310e6, rel=0.02)  # the paper's


def test_rounds_keep_fewer_activations_beside_the_gradients():
    config = load_config("imagenet-256-d16")
    whole = plan_stages(config, 1, 1000)[0].passing_bytes()
    config.train_tokenizer.grad_accumulation = 16
    rounds = plan_stages(config, 1, 1000)[0]
    assert rounds.passing_bytes() == pytest.approx(whole / 16 + 4 * rounds.parameters)


@pytest.mark.parametrize("preset", available_presets())
def test_each_preset_has_a_plan(preset, capsys):
    main([preset])
    assert capsys.readouterr().out.startswith(f"{preset} on 1 h100\n")


def test_the_plan_is_printed(capsys):
    main(["imagenet-256-d16", "--gpus", "8x16", "--utilisation", "0.5", "train_transformer.steps=1000"])
    text = capsys.readouterr().out
    assert text.startswith("imagenet-256-d16 on 128 h100, 8 on each of 16 nodes\n")
    rows = {line[:32].strip(): line[32:].split() for line in text.splitlines() if len(line) > 60}
    assert rows["images a step"] == ["256", "1024"]
    assert rows["steps"] == ["500000", "1000"]
    assert rows["epochs"] == ["99.9", "0.8"]
    plans = plan_stages(load_config("imagenet-256-d16"), 128, 1000)
    assert rows["hours at 50% of the peak"][0] == f"{plans[0].hours(989, 0.5):.3g}"
    assert "243.7 GiB of decoded images" in text
    assert "2612334 images encoded" in text


def test_sources_that_are_mixed_in_take_their_share_of_the_steps_and_of_the_disk(capsys):
    main(["tiny-imagenet-64", "train_tokenizer.steps=1000", "data.mix.shoes.source=fashion-products",
          "data.mix.shoes.share=0.25"])  # fmt: skip
    text = capsys.readouterr().out
    (epochs,) = (line.split()[1:] for line in text.splitlines() if line.strip().startswith("epochs"))
    assert epochs[0] == f"{1000 * 512 * 0.75 / 100_000:.1f}"
    assert f"{(110_000 + 21_588 + 1_362) * 3 * 64**2 / 2**30:.1f} GiB of decoded images" in text


def test_what_does_not_fit_is_said(capsys):
    main(["imagenet-256-d16", "--gpu", "rtx4090"])
    text = capsys.readouterr().out
    assert "The tokenizer does not fit a GPU with 24 GiB: raise train_tokenizer.grad_accumulation or set" in text
    main(["imagenet-256-d16", "--gpus", "8x16", "data.source=mine"])
    text = capsys.readouterr().out
    assert "does not fit" not in text
    assert "mine is not among the data sets known here: 1000 classes are assumed." in text


@pytest.mark.parametrize("arguments, said", [
    (["--gpus", "3"], "train_tokenizer.batch_size=256 is no multiple of 3 GPUs x grad_accumulation=1"),
    (["--gpus", "8x"], "invalid GPUS or GPUSxNODES value: '8x'"),
    (["--utilisation", "35"], "invalid number between 0 and 1 value: '35'"),
    (["--tflops", "0"], "invalid positive number value: '0'"),
    (["train_tokenizer.stps=3"], "did you mean train_tokenizer.steps?"),
])  # fmt: skip
def test_a_wrong_command_line_is_answered_in_a_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(["imagenet-256-d16", *arguments])
    assert said in capsys.readouterr().err.splitlines()[-1]
