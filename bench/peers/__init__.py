"""One module per contender: the same distillation task, written the way that library documents it."""
