"""Any LR images to SR images and the task's predictions, over a cluster (see `plan` and `run`)."""
