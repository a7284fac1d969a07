"""Trains the classifier that judges samples, on the images of a preset alone.

    python -m train.train_classifier fashion-mnist-32

Cross-entropy on the training split, augmented as the two models' images are: a judge that were trained on mirrored
images would not see that a shoe faces the wrong way. The finished classifier is written to OUTPUT/classifier, with
its accuracy on the evaluation split and the SHA-256 of its weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .configs.config import Config
from .data.images import ImageSet, augment, describe_classes, load_splits, to_float
from .evaluation.classifier import Classifier, save_classifier
from .runs.checkpoints import publish
from .runs.command_line import clear_errors, parse_arguments, read
from .runs.engine import Run
from .runs.optimizers import make_optimizer

EVAL_IMAGES, BATCH = 2048, 256


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Share of uint8 images (n, C, H, H) that get their label (n,)."""
    model.eval()
    right = torch.zeros((), device=device)
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        right += (model(to_float(x.to(device))).argmax(dim=1) == y.to(device)).sum()
    model.train()
    return float(right) / len(labels)


def train(run: Run, config: Config, data: ImageSet, heldout: ImageSet) -> None:
    stage, accelerator = config.train_classifier, run.accelerator
    device = accelerator.device
    try:
        classifier = Classifier(
            config.data.image_size, config.data.channels, len(data.class_names), **asdict(config.classifier)
        )
    except ValueError as error:
        run.exit(str(error))
    optimizer = make_optimizer(classifier, stage)
    model, optimizer = accelerator.prepare(classifier, optimizer)
    forward = torch.compile(model) if stage.compile else model
    shown = heldout.evenly(EVAL_IMAGES)
    parameters = sum(p.numel() for p in classifier.parameters())
    run.print(f"{parameters / 1e6:.2f} M parameters, {classifier.num_features} features.")
    run.print(describe_classes(data.labels, data.class_names, config.data.class_balance))

    fetch = run.prefetch(data)
    done = run.resume(len(data), class_names=data.class_names)
    for step in run.steps(done):
        loss_sum = torch.zeros((), device=device)
        for part, (chosen, slot, slots) in enumerate(run.micro_batches(data, step)):
            with run.clock.data():
                images = run.to_device(fetch(step)[slot])
                x = to_float(augment(images, config.data.augment, run.generator(step, 0), slot, slots))
                labels = run.to_device(data.labels[chosen])
            synchronise = part + 1 == stage.grad_accumulation
            with nullcontext() if synchronise else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss = F.cross_entropy(forward(x), labels)
                accelerator.backward(loss / stage.grad_accumulation)
            loss_sum += loss.detach() / stage.grad_accumulation
        run.optimise(optimizer, list(model.parameters()), {"loss": loss_sum}, step)

        done = step + 1
        if run.due(stage.log_every, done):
            run.log_step({"loss": float(run.mean(loss_sum))}, done)
        if run.due(stage.eval_every, done):
            with run.clock.pause():
                value = accuracy(classifier, heldout.images[shown], heldout.labels[shown], device)
            run.log({"eval/accuracy": value}, done)
            run.print(f"step {done}: accuracy {value:.2%} on {len(shown)} held-out images")
        if done % stage.checkpoint_every == 0:
            run.save(done)

    if run.finish(done) and run.is_main:
        value = accuracy(classifier, heldout.images, heldout.labels, device)
        folder = run.args.output / "classifier"
        write = partial(save_classifier, classifier, class_names=data.class_names, accuracy=value)
        publish(folder, write)
        run.print(f"Classifier in {folder}: accuracy {value:.2%} on {len(heldout)} held-out images.")


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(__doc__.split("\n\n")[0], argv)
    with clear_errors():
        run = Run("classifier", config, config.train_classifier, args)
        train(run, config, *read(load_splits, config.data, config.train_classifier.batch_size))


if __name__ == "__main__":
    main()
