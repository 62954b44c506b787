"""Classify handwritten digits with a small CNN: the reference for a training of your own.

Data: scikit-learn's `load_digits`, 1,797 real 8×8 images (UCI ML, E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits").
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sweeper.torch import resumable

NUM_TRAIN = 1437  # four fifths; the rest validates


def train(cfg, run) -> float:
    """Train once and return the validation loss (mean cross-entropy, lower is better)."""
    device = torch.device(cfg.device)
    train_set, valid_set = load_data()
    loader = DataLoader(train_set, batch_size=cfg.batch_size, shuffle=True, pin_memory=device.type == "cuda")
    model = DigitNet(width=cfg.width, dropout=cfg.dropout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    total_steps = cfg.epochs * len(loader) if cfg.max_steps is None else cfg.max_steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_then_linear(cfg.warmup_steps, total_steps)
    )

    loop = resumable(run, model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)
    for images, labels in loop.batches(epochs=cfg.epochs, max_steps=cfg.max_steps):
        model.train()
        optimizer.zero_grad()
        train_loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        train_loss.backward()
        optimizer.step()
        scheduler.step()
        if loop.step % 10 == 0:
            loop.report(train_loss=train_loss, lr=scheduler.get_last_lr()[0])
        if loop.is_epoch_end:
            loss, accuracy = evaluate(model, valid_set, device)
            loop.report(loss=loss, accuracy=accuracy)
    return evaluate(model, valid_set, device)[0]


class DigitNet(nn.Module):
    """Two convolutions and a linear layer: (batch, 1, 8, 8) → (batch, 10) logits."""

    def __init__(self, *, width: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width * 4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = F.max_pool2d(F.relu(self.conv1(images)), 2)
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        return self.head(self.dropout(hidden.flatten(1)))


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Training and validation images as float tensors in [0, 1], with labels 0–9."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, rest = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return TensorDataset(images[first], labels[first]), TensorDataset(images[rest], labels[rest])


def warmup_then_linear(warmup_steps: int, total_steps: int):
    """Learning-rate factor of a step: linear warm-up, then linear decay to a tenth."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 1.0 - 0.9 * (step - warmup_steps) / max(1, total_steps - warmup_steps)

    return factor


@torch.no_grad()
def evaluate(model: nn.Module, dataset: TensorDataset, device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over a whole data set."""
    model.eval()
    images, labels = (tensor.to(device) for tensor in dataset.tensors)
    logits = model(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
