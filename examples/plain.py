"""A training on real images of handwritten digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def step(model, optimizer, scheduler, images, labels):
    model.train()
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()


@torch.no_grad()
def evaluate(model, images, labels):
    model.eval()
    return nn.functional.cross_entropy(model(images), labels).item()


def train(cfg):
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg["lr"])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg["lr"], cfg["epochs"] * len(loader))
    for epoch in range(cfg["epochs"]):
        for batch in loader:
            step(model, optimizer, scheduler, *batch)
        print(f"epoch {epoch} loss {evaluate(model, images[1500:], labels[1500:]):.4f}")
    torch.save(model.state_dict(), "digits.pth")
    return evaluate(model, images[1500:], labels[1500:])


if __name__ == "__main__":
    train({"lr": 3e-3, "epochs": 10})
