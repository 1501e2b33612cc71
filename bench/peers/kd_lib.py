"""KD_Lib: VanillaKD owns the loop. Its own loss is the squared distance of the softmaxes; `loss="kl"` hands it the common one.

It puts the weights of the epoch with the best validation accuracy back; one epoch of all steps makes that the last. The clock stops
where it starts to validate. Its text part needs torchtext.legacy, which no current torch has, and is left out.
"""

import sys
import tempfile
import time
from types import ModuleType

from bench.task import KD_WEIGHT, TEMPERATURE, Pairs, Task, declare_torchvision_operators, serve

declare_torchvision_operators()
sys.modules["KD_Lib.KD.text"] = text = ModuleType("text")
text.__dict__.update(BERT2LSTM=None, get_essentials=None)

from KD_Lib.KD import VanillaKD  # noqa: E402 - it imports torchvision and its text part, both arranged above
from torch import Tensor, nn  # noqa: E402 - kept with it


class Kl(nn.Module):
    """KL divergence of probabilities, the mean over samples, in VanillaKD's order of arguments."""

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        return nn.functional.kl_div(student.log(), teacher, reduction="batchmean")


class Validation:
    """The test images as one batch, noting when it is asked for."""

    def __init__(self, task: Task):
        self.dataset, self.asked = task.data.test, 0.0

    def __iter__(self):
        self.asked = time.process_time()
        yield self.dataset.images(), self.dataset.labels


def train(task: Task, loss: str) -> float:
    validation = Validation(task)
    choice = {"loss_fn": Kl()} if loss == "kl" else {}
    distiller = VanillaKD(
        task.teacher,
        task.student,
        Pairs(task).loader(),
        validation,
        None,
        task.optimizer(),
        temp=TEMPERATURE,
        distil_weight=KD_WEIGHT,
        **choice,
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        distiller.train_student(epochs=1, plot_losses=False, save_model=False, save_model_pth=f"{folder}/student.pt")
    return validation.asked - started


if __name__ == "__main__":
    serve(train)
