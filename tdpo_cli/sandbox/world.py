"""A procedural world of captioned shapes and the gold reward that judges pictures of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CANVAS = 32  # pixels, both ways

# Sizes are equivalent radii: a shape of size r covers pi * r^2 pixels, whatever its outline.
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
EXTENTS = (1.0, 0.886, 1.555, 1.253, 1.155, 1.189)  # how far each outline reaches, per unit of size

# The two palettes share no word, so a shape can never vanish into its background.
COLOURS = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.15, 0.78, 0.20),
    "cyan": (0.15, 0.88, 0.92),
    "purple": (0.62, 0.15, 0.88),
    "pink": (1.00, 0.50, 0.78),
    "white": (0.98, 0.98, 0.98),
}
BACKGROUNDS = {
    "black": (0.05, 0.05, 0.06),
    "gray": (0.48, 0.48, 0.50),
    "blue": (0.12, 0.20, 0.60),
    "brown": (0.42, 0.26, 0.12),
    "teal": (0.02, 0.38, 0.38),
    "maroon": (0.38, 0.02, 0.12),
    "tan": (0.70, 0.60, 0.40),
}

SMALLEST, LARGEST = 4.0, 9.0  # sizes of sampled scenes, px
SIZE_WORDS = ("tiny", "small", "medium", "large", "huge")
ROW_WORDS, COLUMN_WORDS = ("upper", "middle", "lower"), ("left", "centre", "right")
HELD_OUT = 48  # combinations kept out of reinforcement learning


# Prompts


def prompt_of(shape: str, colour: str, background: str) -> str:
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {shape} on a {background} background"


def all_prompts() -> list[str]:
    """Every combination of shape, colour and background: 6 x 8 x 7 = 336."""
    return [prompt_of(s, c, b) for s in SHAPES for c in COLOURS for b in BACKGROUNDS]


def held_out_prompts() -> list[str]:
    """48 combinations that no policy is trained on: one for each shape and colour, backgrounds in turn."""
    backgrounds = list(BACKGROUNDS)
    return [
        prompt_of(shape, colour, backgrounds[(3 * i + j) % len(backgrounds)]) for i, shape in enumerate(SHAPES) for j, colour in enumerate(COLOURS)
    ]


def train_prompts() -> list[str]:
    held_out = set(held_out_prompts())
    return [prompt for prompt in all_prompts() if prompt not in held_out]


def quickstart_prompts() -> list[str]:
    """Eight training prompts: every colour once, every shape and every background at least once."""
    return [
        "a red circle on a blue background",
        "a yellow square on a black background",
        "a white triangle on a maroon background",
        "a pink diamond on a teal background",
        "a cyan ring on a brown background",
        "a green cross on a tan background",
        "a purple triangle on a gray background",
        "an orange circle on a blue background",
    ]


_LOOKUP = {prompt_of(s, c, b): (i, j, k) for i, s in enumerate(SHAPES) for j, c in enumerate(COLOURS) for k, b in enumerate(BACKGROUNDS)}


def parse(prompts: list[str]) -> Tensor:
    """Indices of (shape, colour, background), [b, 3]."""
    rows = []
    for prompt in prompts:
        row = _LOOKUP.get(prompt.strip().lower())
        if row is None:
            raise ValueError(
                f"the gold reward cannot read the prompt {prompt!r}: "
                f"expected 'a COLOUR SHAPE on a BACKGROUND background' with "
                f"COLOUR in {', '.join(COLOURS)}; SHAPE in {', '.join(SHAPES)}; BACKGROUND in {', '.join(BACKGROUNDS)}"
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 3)


# Scenes


@dataclass(frozen=True)
class Scene:
    """A batch of n scenes."""

    shape: Tensor  # [n] index into SHAPES
    colour: Tensor  # [n] index into COLOURS
    background: Tensor  # [n] index into BACKGROUNDS
    size: Tensor  # [n] equivalent radius, px
    x: Tensor  # [n] centroid, px right of the middle
    y: Tensor  # [n] centroid, px below the middle
    gradient: Tensor  # [n, 2] brightness added to the background at the right and the lower edge
    jitter: Tensor  # [n, 2, 3] added to the colour of the shape and of the background

    def __len__(self) -> int:
        return len(self.shape)


def sample_scenes(generator: torch.Generator | int, n: int, prompts: list[str] | None = None) -> Scene:
    """Draw n scenes; with prompts (one per scene) only what the words leave open is drawn."""
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    if prompts is not None and len(prompts) != n:
        raise ValueError(f"{n} scenes were asked for, but {len(prompts)} prompts given: give one per scene")

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator)

    if prompts is None:
        counts = (len(SHAPES), len(COLOURS), len(BACKGROUNDS))
        words = torch.stack([torch.randint(count, (n,), generator=generator) for count in counts], dim=1)
    else:
        words = parse(prompts)
    size = uniform(SMALLEST, LARGEST, n)
    room = (CANVAS / 2 - 0.5 - torch.tensor(EXTENTS)[words[:, 0]] * size).clamp(0, 7)  # the shape stays inside
    return Scene(
        shape=words[:, 0],
        colour=words[:, 1],
        background=words[:, 2],
        size=size,
        x=uniform(-1, 1, n) * room,
        y=uniform(-1, 1, n) * room,
        gradient=uniform(-0.06, 0.06, n, 2),
        jitter=uniform(-0.05, 0.05, n, 2, 3),
    )


def short_captions(scenes: Scene) -> list[str]:
    shapes, colours, backgrounds = SHAPES, list(COLOURS), list(BACKGROUNDS)
    rows = zip(scenes.shape.tolist(), scenes.colour.tolist(), scenes.background.tolist(), strict=False)
    return [prompt_of(shapes[s], colours[c], backgrounds[b]) for s, c, b in rows]


def caption(scenes: Scene) -> list[str]:
    """Long captions: also how large the shape is and where it lies, as a model of language and pictures needs them."""
    step = (LARGEST - SMALLEST) / len(SIZE_WORDS)
    sizes = ((scenes.size - SMALLEST) / step).long().clamp(0, len(SIZE_WORDS) - 1).tolist()
    rows, columns = (((v > -2).long() + (v > 2).long()).tolist() for v in (scenes.y, scenes.x))
    captions = []
    for short, size, row, column in zip(short_captions(scenes), sizes, rows, columns, strict=False):
        subject, ground = short.split(" ", 1)[1].split(" on ")
        captions.append(f"a {SIZE_WORDS[size]} {subject} at the {ROW_WORDS[row]} {COLUMN_WORDS[column]} on {ground}")
    return captions


def vocabulary() -> list[str]:
    """Every word that a caption can hold."""
    fixed = ["a", "an", "on", "at", "the", "background"]
    return [*fixed, *SHAPES, *COLOURS, *BACKGROUNDS, *SIZE_WORDS, *ROW_WORDS, *COLUMN_WORDS]


# Rendering


def _coordinates(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres relative to centroids x, y [n]: two [n, 32, 32]."""
    axis = torch.arange(CANVAS, dtype=x.dtype, device=x.device) - (CANVAS - 1) / 2
    dx = axis.view(1, 1, -1) - x.view(-1, 1, 1)
    dy = axis.view(1, -1, 1) - y.view(-1, 1, 1)
    return torch.broadcast_tensors(dx, dy)


def outlines(size: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Coverage in [0, 1] of every shape at the given sizes and centroids, [n, 6, 32, 32]."""
    dx, dy = _coordinates(x, y)
    r = size.view(-1, 1, 1)
    ax, ay, radius = dx.abs(), dy.abs(), torch.hypot(dx, dy)
    arm, half = 1.1890 * r, 0.3963 * r  # a cross of two bars, three times as long as wide
    distances = [  # signed, px; constants give each outline the area pi * r^2 and its centroid at the origin
        radius - r,
        torch.maximum(ax, ay) - 0.8862 * r,
        torch.maximum(dy, 0.8660 * ax - 0.5 * dy) - 0.7776 * r,
        (ax + ay - 1.2533 * r) / math.sqrt(2),
        (radius - 0.8660 * r).abs() - 0.2887 * r,
        torch.minimum(torch.maximum(ax - arm, ay - half), torch.maximum(ax - half, ay - arm)),
    ]
    return (0.5 - torch.stack(distances, dim=1)).clamp(0, 1)  # a ramp of one pixel


def render(scenes: Scene) -> Tensor:
    """Anti-aliased pictures, [n, 3, 32, 32] in [0, 1]."""
    n = len(scenes)
    mask = outlines(scenes.size, scenes.x, scenes.y)[torch.arange(n), scenes.shape].unsqueeze(1)  # [n, 1, 32, 32]
    ink = torch.tensor(list(COLOURS.values()))[scenes.colour] + scenes.jitter[:, 0]  # [n, 3]
    ground = torch.tensor(list(BACKGROUNDS.values()))[scenes.background] + scenes.jitter[:, 1]
    ramp = torch.linspace(-1, 1, CANVAS)
    across, down = scenes.gradient.view(n, 2, 1, 1).unbind(1)
    shade = across * ramp.view(1, 1, -1) + down * ramp.view(1, -1, 1)  # [n, 32, 32]
    canvas = ground.view(n, 3, 1, 1) + shade.unsqueeze(1)
    return (canvas + mask * (ink.view(n, 3, 1, 1) - canvas)).clamp(0, 1)


# The gold reward: read the picture, draw what the prompt says in the same place, compare


def gold(images: Tensor, prompts: list[str]) -> Tensor:
    """The true reward of images [b, 3, H, W] in [0, 1]: fidelity x preference, [b] in [0, 1]."""
    terms = gold_terms(images, prompts)
    return terms["fidelity"] * terms["preference"]


@torch.no_grad()
def gold_terms(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """The parts of the gold reward, each [b]; all in [0, 1] but `radius`, the size that was read, in px."""
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts: give one prompt per image")
    images = _to_canvas(images)
    words = parse(prompts).to(images.device)
    mask, contrast = _figure(images)
    area = mask.sum(dim=(1, 2)).clamp_min(1.0)
    x, y = _centroid(mask, area)
    radius = (area / math.pi).sqrt()

    shape = _shape_match(mask, radius, x, y, words[:, 0]) * contrast
    colour = _closeness(_mean_colour(images, mask), COLOURS, words[:, 1])
    background = _closeness(_mean_colour(images, 1 - mask), BACKGROUNDS, words[:, 2])
    size = _size_liking(radius)
    centredness = (1 - torch.hypot(x, y) / 10).clamp(0, 1)
    return {
        "fidelity": shape * colour * background,
        "preference": 0.2 + 0.4 * size + 0.4 * centredness,
        "shape": shape,
        "colour": colour,
        "background": background,
        "size": size,
        "centredness": centredness,
        "radius": radius,
    }


def _to_canvas(images: Tensor) -> Tensor:
    """Any resolution -> [b, 3, 32, 32] float32."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {list(images.shape)}; expected [b, 3, H, W] with values in [0, 1]")
    images = images.float()
    if images.shape[-2:] != (CANVAS, CANVAS):
        images = F.interpolate(images, size=(CANVAS, CANVAS), mode="bilinear", antialias=True, align_corners=False)
    return images.nan_to_num(0.0).clamp(0, 1)


def _figure(images: Tensor) -> tuple[Tensor, Tensor]:
    """Where something stands out from the border's colour: soft mask [b, 32, 32]; how clearly it does, [b]."""
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, 1:-1, 0], images[:, :, 1:-1, -1]], dim=-1)
    ground = border.median(dim=-1).values  # [b, 3]; the median bears a shape that runs out of the frame
    distance = (images - ground[:, :, None, None]).norm(dim=1)  # [b, 32, 32]
    strongest = distance.flatten(1).topk(24).values.mean(dim=1)
    relative = distance / strongest.clamp_min(1e-3)[:, None, None]
    mask = ((relative - 0.25) / 0.5).clamp(0, 1)  # half way counts half, so smooth edges keep their area
    return mask, (strongest / 0.3).clamp(0, 1)


def _centroid(mask: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    axis = torch.arange(CANVAS, dtype=mask.dtype, device=mask.device) - (CANVAS - 1) / 2
    return (mask.sum(1) * axis).sum(1) / area, (mask.sum(2) * axis).sum(1) / area


def _shape_match(mask: Tensor, radius: Tensor, x: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
    """Overlap with the wanted outline, less where another outline explains the mask better."""
    drawn = outlines(radius, x, y)  # [b, 6, 32, 32]
    seen = mask.unsqueeze(1)
    overlap = torch.minimum(drawn, seen).sum((2, 3)) / torch.maximum(drawn, seen).sum((2, 3)).clamp_min(1e-6)  # [b, 6]
    of_wanted = overlap.gather(1, wanted.unsqueeze(1)).squeeze(1)
    rivalry = of_wanted / overlap.max(dim=1).values.clamp_min(1e-6)
    # a circle overlaps a square of its area by 0.83: only the upper part of the scale tells outlines apart
    return ((of_wanted - 0.4) / 0.5).clamp(0, 1) * rivalry**4


def _mean_colour(images: Tensor, weight: Tensor) -> Tensor:
    weight = weight.unsqueeze(1)
    return (images * weight).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1e-3)


def _closeness(seen: Tensor, palette: dict[str, tuple], wanted: Tensor) -> Tensor:
    """1 at the named colour, 0.6 at a distance of 0.2, next to nothing at another colour."""
    named = torch.tensor(list(palette.values()), dtype=seen.dtype, device=seen.device)[wanted]
    return torch.exp(-0.5 * ((seen - named).norm(dim=1) / 0.2) ** 2)


def _size_liking(radius: Tensor) -> Tensor:
    """Rises up to the largest size of the sampled world, then falls: who only learns "bigger is better" overshoots."""
    rising = (radius - 3) / (LARGEST - 3)
    falling = 1 - (radius - LARGEST) / 4
    return torch.minimum(rising, falling).clamp(0, 1)
