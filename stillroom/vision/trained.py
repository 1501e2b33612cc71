"""Networks that learn labels: the one supervised loop, and teachers by name (pretrained ones as they are, small ones trained first)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stillroom.core.config import Count
from stillroom.core.optim import BuildOptimizer, Optimizer
from stillroom.core.run import Run
from stillroom.data.augment import Augmentation, augmenter
from stillroom.data.batches import Batches
from stillroom.data.images import ImageData
from stillroom.data.load import ImageConfig
from stillroom.losses.divergences import cross_entropy
from stillroom.vision import hub


@dataclass(frozen=True)
class TeacherConfig(ImageConfig):
    """What a recipe with a teacher on images reads: its Config inherits these flags."""

    augment: Augmentation = "none"
    """Augmentation of training images."""
    teacher: str = "small:convnet-w32"
    """small:NAME is trained first; hf:ID-or-folder, timm:NAME or run:FOLDER is taken as it is."""
    teacher_steps: Count = 600
    """Training steps of a small: teacher."""
    teacher_optimizer: Optimizer = Optimizer("adamw", 2e-3, weight_decay=1e-2, schedule="cosine")
    batch_size: Count = 64

    def classifier(self, run: Run, data: ImageData) -> nn.Module:
        """The teacher, ready for `run.frozen`. A small: one is trained on the labelled images by cross-entropy, once for all runs that want
        the same. UserError as for `hub.load_classifier`."""
        if not self.teacher.startswith("small:"):
            return hub.load_classifier(self.teacher, data=data)
        decides = (self.teacher, data, self.teacher_steps, self.teacher_optimizer, self.batch_size, self.augment)
        with run.stage("teacher", shared=(fit, *decides)) as stage:
            net, view = hub.load_classifier(self.teacher, data=data, fresh=True), augmenter(self.augment, data.size)
            return fit(stage, "teacher", net, data.train, self.teacher_steps, self.teacher_optimizer, self.batch_size, view)


def fit(
    stage: Run,
    name: str,
    net: nn.Module,
    split: Any,
    steps: int,
    optimizer: BuildOptimizer,
    batch_size: int,
    view: Callable[[Tensor], Tensor] = lambda inputs: inputs,
) -> nn.Module:
    """All weights learn the labels of a split (images, or token ids) by cross-entropy on views of its inputs. The network, whole."""
    net, learner = stage.trainable(name, net, optimizer)
    batches = Batches(split, batch_size, stage.seed)
    for step in stage.steps(steps):
        _, inputs, labels = stage.shard(batches(step))
        stage.update(learner, ce=cross_entropy(net(view(inputs)), labels))
    return stage.unwrap(net)
