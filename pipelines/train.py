"""The first stage: a trained model, or the user's checkpoint, and its accuracy."""

from __future__ import annotations

import math
import time
from typing import Any

from spray.data.truth import FILES, write_truth
from spray.errors import UserError
from spray.pipelines.context import Context
from spray.pipelines.stage import Stage
from spray.pipelines.weights import save_weights
from spray.training import train
from spray.verification import clean_metrics


def run(context: Context) -> dict[str, Any]:
    """Write `model.pt`: trained here, or the checkpoint's weights, which are only evaluated.

    What was planted in the images is written down as well, once and for all, for those who may know it.
    """
    options = context.config.model
    write_truth(context.run_dir, context.planted_truths, context.test)
    model = context.build_model()
    losses: list[float] = []
    if options.checkpoint is None:
        context.log.info(
            "training %s on %d images, %d epochs",
            options.factory or options.name,
            len(context.train),
            options.epochs,
        )
        start = time.monotonic()

        def report(epoch: int, loss: float) -> None:
            if not math.isfinite(loss):
                raise UserError(
                    f"training has diverged: the loss of epoch {epoch} is not finite; give a lower "
                    "model.learning_rate, or weights as model.checkpoint"
                )
            losses.append(round(loss, 6))
            left = (time.monotonic() - start) / epoch * (options.epochs - epoch)
            context.log.info("epoch %d/%d: loss %.4f, %.0f s left", epoch, options.epochs, loss, left)

        train(
            model,
            context.train,
            context.normalizer,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            seed=context.config.seed,
            device=context.device,
            on_epoch=report,
        )
    save_weights(context.run_dir / "model.pt", model)
    context.forget_model()
    metrics = clean_metrics(context.predict(model, context.test), context.test.labels)
    context.log.info("test accuracy %.3f", metrics["clean_accuracy"])
    return {"trained": options.checkpoint is None, "losses": losses, **metrics}


STAGE = Stage(
    name="train",
    needs=(),
    settings=("dataset", "model", "seed"),
    outputs=("model.pt", FILES),
    run=run,
)
