"""Teachers by name: pretrained ones as they are, small ones trained first."""

from __future__ import annotations

from torch import nn

from stillroom import hub
from stillroom.data.augment import Augmentation, augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData
from stillroom.losses.divergences import cross_entropy
from stillroom.optim import Optimizer
from stillroom.run import Run


def classifier(
    run: Run, name: str, spec: str, data: ImageData, *, steps: int, optimizer: Optimizer, batch_size: int, augment: Augmentation
) -> nn.Module:
    """The classifier that `spec` names (see `hub.load_classifier`). A small: one is trained on the labelled images by cross-entropy, in a
    stage called `name`, once for all runs that want the same."""
    if not spec.startswith("small:"):
        return hub.load_classifier(spec, data=data)
    with run.stage(name, shared=(classifier, spec, data, steps, optimizer, batch_size, augment)) as stage:
        net, learner = stage.trainable(name, hub.load_classifier(spec, data=data, fresh=True), optimizer)
        view, batches = augmenter(augment, data.size), Batches(data.train, batch_size, stage.seed)
        for step in stage.steps(steps):
            _, image, label = stage.shard(batches(step))
            stage.update(learner, ce=cross_entropy(net(view(image)), label))
        return stage.unwrap(net)
