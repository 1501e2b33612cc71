"""torchdistill: a DistillationBox with KDLoss, driven by the loop of its examples.

Its `alpha` weighs the labels, the other way round than most. `post_forward_process` does backward, step and zero_grad.
"""

import logging
import time

from bench.task import CE_WEIGHT, DECAY, LR, TEMPERATURE, Task, declare_torchvision_operators, serve

declare_torchvision_operators()

import torch  # noqa: E402 - kept with the next
from torchdistill.core.distillation import get_distillation_box  # noqa: E402 - it imports torchvision, whose operators are declared above

logging.disable(logging.INFO)


def train(task: Task) -> float:
    logits = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output"}
    kd_loss = {"key": "KDLoss", "kwargs": {**logits, "temperature": TEMPERATURE, "alpha": CE_WEIGHT}}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": LR, "weight_decay": DECAY, "fused": True}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd_loss, "weight": 1.0}}}},
    }
    box = get_distillation_box(task.teacher, task.student, {}, config, torch.device("cpu"), None, False, 1)
    started = time.process_time()
    box.pre_epoch_process(epoch=0)
    for _, image, label in task.batches():
        box.pre_forward_process()
        loss = box.forward_process(image, targets=label, supp_dict=None)
        box.post_forward_process(loss=loss)
    return time.process_time() - started


if __name__ == "__main__":
    serve(train)
