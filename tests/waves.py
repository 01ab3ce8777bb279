"""Small autoencoders, and coloured waves for them to learn from."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from raylarge.diffusion.noise import generator
from raylarge.models.discriminator import DiscriminatorConfig
from raylarge.train import registry
from raylarge.train.config import Train
from raylarge.train.task import DataFacts
from raylarge.train.tasks.vae import VaeConfig

SIDE = 16
FACTS = DataFacts(0, {0: 100}, (3, SIDE, SIDE), None, None, {})
JUDGE = DiscriminatorConfig(width=16, layers=2)
SMALL = {
    "light": VaeConfig(width=16, blocks=1),
    "vq": VaeConfig(kind="vq", channels=(32, 32), factor=2, layers=1, codes=64),
    "kl": VaeConfig(kind="kl", channels=(32, 32), factor=2, layers=1, latent_channels=4),
}
JUDGED = replace(SMALL["light"], adversarial=0.02, discriminator=JUDGE)


Config = partial(Train, model="vae", data="", out="")


def rows(samples):
    """Waves of a random direction and colour for each sample."""
    found = []
    for sample in samples:
        draw = generator(3, "image", sample >> 32, sample & 0xFFFFFFFF)
        place = np.arange(SIDE) / SIDE
        waves = draw.uniform(-2, 2, 2) @ np.stack(np.meshgrid(place, place)).reshape(2, -1)
        colour, shade = draw.uniform(-0.8, 0.8, (2, 3, 1))
        found.append((colour * np.sin(2 * np.pi * waves) + 0.2 * shade).reshape(3, SIDE, SIDE))
    image = torch.from_numpy(np.stack(found)).float()
    return {"sample": torch.tensor(list(samples)), "image": image}


def made(config, **recipe):
    return registry.build(Config(vae=config, **recipe).run, FACTS)


def learn(task, steps, lr=3e-3, batch=8):
    """Plain training; the held-out loss before and after."""
    optimizer = torch.optim.AdamW(task.network.parameters(), lr)
    held = task.draw(rows(range(10_000, 10_016)))
    losses = []
    for step in range(steps + 1):
        if step in (0, steps):
            with torch.no_grad():
                losses.append(float(task.network(held).mean()))
        drawn = task.draw(rows(range(step * batch, (step + 1) * batch)))
        optimizer.zero_grad()
        task.network(drawn).mean().backward()
        optimizer.step()
    return losses


def gradients(task, batch):
    """The loss of each sample, and the gradient of their sum."""
    task.network.zero_grad()
    losses = task.network(batch)
    losses.sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in task.network.named_parameters()}
