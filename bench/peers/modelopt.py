"""NVIDIA ModelOpt: `mtd.convert` to a distillation model whose `compute_kd_loss` balances both terms; the loop is the user's own.

Its loss divides by the classes unless reduction="batchmean" is asked for.
"""

import copy
import time

import modelopt.torch.distill as mtd
import torch
from torch.nn import functional as F

from bench.task import DECAY, KD_WEIGHT, LR, TEMPERATURE, Task, serve


def train(task: Task) -> float:
    config = {
        "teacher_model": task.teacher,
        "criterion": mtd.LogitsDistillationLoss(temperature=TEMPERATURE, reduction="batchmean"),
        "loss_balancer": mtd.StaticLossBalancer(kd_loss_weight=KD_WEIGHT),
    }
    model = mtd.convert(copy.deepcopy(task.student), mode=[("kd_loss", config)])
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), LR, weight_decay=DECAY, fused=True)
    started = time.process_time()
    for _, image, label in task.batches():
        optimizer.zero_grad()
        loss = model.compute_kd_loss(student_loss=F.cross_entropy(model(image), label))
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - started
    task.student = mtd.export(model)
    return seconds


if __name__ == "__main__":
    serve(train)
