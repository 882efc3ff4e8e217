"""A whole PyTorch program on one screen: teach a small network to read digits, then test it."""

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import v2


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.look = torch.nn.Conv2d(1, 16, kernel_size=5, stride=2)  # finds strokes and the like
        self.decide = torch.nn.Linear(16 * 12 * 12, 10)  # weighs them up: one score per digit

    def forward(self, images):  # takes images (N, 1, 28, 28), returns scores (N, 10)
        return self.decide(torch.relu(self.look(images)).flatten(start_dim=1))


to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
train_set = MNIST("data", train=True, download=True, transform=to_tensor)
test_set = MNIST("data", train=False, download=True, transform=to_tensor)
model = Network()
optimizer = torch.optim.Adam(model.parameters(), lr=0.002)

for epoch in (1, 2):
    for images, labels in DataLoader(train_set, batch_size=64, shuffle=True):
        loss = torch.nn.functional.cross_entropy(model(images), labels)  # how wrong are we?
        optimizer.zero_grad()  # clear the last step's gradients
        loss.backward()  # which way should each weight move?
        optimizer.step()  # move them all a tiny bit
    print(f"epoch {epoch}: the last batch's loss was {loss:.3f}")

with torch.inference_mode():  # we only want answers now, so autograd can take a break
    right = sum((model(x).argmax(dim=1) == y).sum() for x, y in DataLoader(test_set, 500))
print(f"Test accuracy: {right / len(test_set):.2%}")
