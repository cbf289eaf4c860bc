"""Pictures in colour that look a little like photographs, made without any: four kinds of scenes.

A sunset over the sea, green hills, a town at night, a flower in the grass, each with colours,
places and textures at random. `python benchmarks/scenes.py FOLDER 200` writes PNG files in a
sub-folder for each kind.
"""

import sys
from pathlib import Path

import numpy as np

KINDS = ("sea", "hills", "town", "flower")
SKIES = (  # at the horizon, above
    ((240, 150, 90), (90, 110, 190)),
    ((200, 220, 240), (90, 150, 230)),
    ((15, 20, 45), (50, 45, 80)),
    ((230, 215, 190), (150, 190, 225)),
)
SUN, LAMP = np.array([255, 235, 170]), (250, 220, 120)
PETALS = ((220, 60, 90), (230, 200, 60), (180, 90, 210))


def make(count, seed, side=64):
    """A dict of "image" `(count, side, side, 3)` uint8 and "label" `(count,)`, kinds in turn."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(KINDS)
    images = np.stack([Scene(random, side).draw(kind) for kind in labels])
    return {"image": images, "label": labels.astype("int32")}


class Scene:
    """One picture: an array that is painted from back to front."""

    def __init__(self, random, side):
        self.random, self.side = random, side
        self.y, self.x = np.mgrid[0:side, 0:side] / (side - 1.0)

    def draw(self, kind):
        near, above = (self.colour(c, 25) for c in SKIES[kind])
        self.image = above + (near - above) * self.y[..., None]
        (self.sea, self.hills, self.town, self.flower)[kind]()
        noisy = self.image + self.random.normal(0, 3, self.image.shape)
        return np.clip(noisy, 0, 255).astype("uint8")

    def sea(self):
        x, y, between = self.x, self.y, self.random.uniform
        left, top, radius = between(0.2, 0.8), between(0.15, 0.45), between(0.05, 0.12)
        self.paint(SUN, edge(radius - np.hypot(x - left, y - top)))
        horizon = between(0.5, 0.65)
        waves = np.sin(80 * y * y + 3 * np.sin(9 * x + between(0, 6)))
        water = self.colour((40, 80, 130), 25) + 25 * waves[..., None]
        glow = np.exp(-(((x - left) / (0.03 + 0.2 * (y - horizon).clip(0))) ** 2))
        water = water + (SUN - water) * 0.6 * glow[..., None]
        self.paint(water, edge(y - horizon, 0.006))

    def hills(self):
        for k, colour in enumerate(((120, 150, 140), (80, 130, 70), (50, 100, 40))):
            ground = self.colour(colour, 15) + self.texture(25)
            self.paint(ground, edge(self.y - self.ridge(0.45 + 0.17 * k, 0.05), 0.01))

    def town(self):
        between, left = self.random.uniform, 0.0
        columns, rows = (self.x * 64).astype(int), (self.y * 64).astype(int)
        windows = (columns % 4 < 2) & (rows % 5 < 2)
        while left < 1:
            width, top = between(0.08, 0.2), between(0.25, 0.75)
            house = (self.x >= left) & (self.x < left + width) & (self.y > top)
            self.image[house] = self.colour((35, 35, 45), 8)
            lit = self.random.random((17, 17))[rows // 5, columns // 4] < 0.5
            self.image[house & windows & lit] = LAMP
            left += width + between(0, 0.04)

    def flower(self):
        x, y, between = self.x, self.y, self.random.uniform
        grass = self.colour((90, 140, 60), 12) + self.texture(30)
        self.paint(grass, edge(y - self.ridge(0.7, 0.02), 0.01))
        left, top, radius = between(0.3, 0.7), between(0.3, 0.5), between(0.15, 0.25)
        stalk = edge(0.018 - np.abs(x - left), 0.006) * edge(y - top)
        self.paint(self.colour((60, 110, 50), 8), stalk)
        angle, far = np.arctan2(y - top, x - left), np.hypot(x - left, y - top)
        count = self.random.integers(5, 9)
        outline = radius * (0.65 + 0.35 * np.cos(count * angle + between(0, 6)))
        colour = PETALS[self.random.integers(len(PETALS))]
        self.paint(self.colour(colour, 15), edge(outline - far, 0.01))
        self.paint(np.array([90, 60, 30]), edge(0.25 * radius - far, 0.01))

    def paint(self, colour, mask):
        self.image = self.image + (colour - self.image) * mask[..., None]

    def colour(self, base, spread):
        return np.clip(np.array(base) + self.random.normal(0, spread, 3), 0, 255)

    def ridge(self, height, roughness):
        """The height of a line of hills over x, a sum of sines."""
        waves, phases = self.random.uniform(1, 4, 4), self.random.uniform(0, 6.3, 4)
        sizes = self.random.uniform(0.3, 1, 4) / np.arange(1, 5)
        sines = np.sin(6.3 * waves[:, None] * self.x[0] + phases[:, None])
        return height + roughness * (sizes[:, None] * sines).sum(axis=0)

    def texture(self, strength):
        """Noise that is smooth over a few pixels."""
        noise = self.random.normal(0, 1, (self.side, self.side))
        kernel = np.exp(-(np.linspace(-2, 2, 5) ** 2))
        for axis in (0, 1):
            noise = np.apply_along_axis(np.convolve, axis, noise, kernel / kernel.sum(), "same")
        return strength * noise[..., None]


def edge(distance, width=0.015):
    """1 inside (a positive distance), 0 outside, soft between."""
    return 1 / (1 + np.exp(-np.clip(distance / width, -50, 50)))


def main(folder, count):
    from keras_uvit.evaluation import write_png

    content = make(int(count), 0)
    for k, (image, label) in enumerate(zip(*content.values())):
        write_png(Path(folder) / KINDS[label] / f"{k:04d}.png", image)


if __name__ == "__main__":
    main(*sys.argv[1:])
