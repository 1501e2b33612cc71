"""Plain PyTorch: no teacher, the teacher asked in every step, or its logits computed once."""

import time

import torch
from torch.nn import functional as F

from bench.task import CE_WEIGHT, KD_WEIGHT, TEMPERATURE, Task, serve
from stillroom.metrics.classification import evaluate


def train(task: Task, mode: str) -> float:
    student, teacher, optimizer = task.student.train(), task.teacher, task.optimizer()
    table = evaluate(teacher, task.data.train)[0]
    started = time.process_time()
    for index, image, label in task.batches():
        logits = student(image)
        loss = F.cross_entropy(logits, label)
        if mode != "plain":
            with torch.no_grad():
                target = table[index] if mode == "cached" else teacher(image)
            soft = F.kl_div((logits / TEMPERATURE).log_softmax(-1), (target / TEMPERATURE).softmax(-1), reduction="batchmean")
            loss = CE_WEIGHT * loss + KD_WEIGHT * TEMPERATURE**2 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.process_time() - started


if __name__ == "__main__":
    serve(train)
