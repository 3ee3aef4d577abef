"""Pictures of the toy world: square RGB, a pure function of (subject, scene, seed, size).

Shapes are drawn with PIL at three times the size and averaged down; shading, shadow and tint come after. Places
are painted once per variant and kept. Body coordinates: the creature fills about [-1, 1], y points down. Poses and
widths of lines are in units of 1/64 of the picture, so that all that is drawn grows with it.
"""

import colorsys
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from customized_grpo.toyworld.world import Scene, Subject

SIZE = 64
"""Width and height of a picture of the packaged models, in pixels, and the unit of poses: a 64th of the picture."""
SUPERSAMPLING = 3
PLACE_SUPERSAMPLING = 4
PLACE_VARIANTS = 12

Pixels: TypeAlias = npt.NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]
Fill: TypeAlias = Colour | int
"""A colour, or a grey on a stencil."""
Point: TypeAlias = tuple[float, float]

RGB: dict[str, Colour] = {
    "red": (222, 66, 66),
    "orange": (244, 148, 58),
    "yellow": (250, 214, 84),
    "green": (92, 182, 98),
    "blue": (72, 128, 222),
    "purple": (148, 92, 204),
    "pink": (246, 150, 190),
    "brown": (146, 98, 66),
}
"""Of the names in `COLOURS`."""
INK: Colour = (38, 32, 46)
WHITE: Colour = (255, 255, 255)
CREAM: Colour = (252, 242, 218)

TINTS: dict[str, tuple[Colour, Colour]] = {
    "night": ((206, 208, 240), (2, 4, 14)),
    "sea": ((224, 240, 250), (0, 8, 14)),
    "desert": ((255, 243, 224), (4, 0, 0)),
    "forest": ((238, 250, 236), (0, 2, 0)),
    "snow": ((248, 250, 255), (4, 5, 7)),
}
"""Light of a place on what stands in it: multiply (out of 255), then add."""


def render(subject: Subject, scene: Scene, seed: int, size: int = SIZE) -> Pixels:
    """The picture: (size, size, 3) uint8. The seed picks the pose and the variant of the place.

    Args:
        size: width and height in pixels, a multiple of 64. At 64 all creatures stand almost alike, as the packaged
            models have learned them; above, each place moves, scales and turns the creature in its own way.
    """
    return render_with_mask(subject, scene, seed, size)[0]


def render_with_mask(
    subject: Subject, scene: Scene, seed: int, size: int = SIZE, *, posed_for: Scene | None = None
) -> tuple[Pixels, Pixels]:
    """The same picture and its subject mask: (size, size) uint8, 255 on the creature, not on what the prompt adds.

    Args:
        posed_for: a scene whose pose the creature takes, so that two pictures differ in one part alone.
    """
    rng = random.Random(seed)
    place = background(scene.background, rng.randrange(PLACE_VARIANTS), size)
    stage = posed_for or scene
    pose = _sample_pose(subject, stage, rng, moves=size > SIZE and stage.kind is not None)
    layer = Image.new("RGBA", (size * SUPERSAMPLING, size * SUPERSAMPLING), (0, 0, 0, 0))
    brush = Brush(ImageDraw.Draw(layer), layer, pose)
    _draw_creature(brush, subject, scene)
    mask = np.asarray(layer.getchannel("A").reduce(SUPERSAMPLING))
    if scene.accessory:
        _draw_accessory(brush, subject, scene)
    if scene.companion and scene.companion_colour:
        _draw_companion(brush, scene, rng)
    return _light(layer, place, scene, pose), mask


def _light(layer: Image.Image, place: npt.NDArray[np.float32], scene: Scene, pose: "Pose") -> Pixels:
    """Average the layer down, round it with soft light from the upper left, tint it, and set it on its shadow."""
    small = layer.convert("RGBa").reduce(SUPERSAMPLING)  # "RGBa": colours already multiplied by alpha
    unit = small.width // SIZE
    pixels = np.asarray(small, dtype=np.float32)
    alpha_image = small.getchannel("a")
    alpha = pixels[..., 3:] / 255
    blurred = np.asarray(alpha_image.filter(ImageFilter.BoxBlur(3 * unit)), dtype=np.float32)
    padded = np.pad(blurred, 3 * unit, mode="edge")
    slope = padded[6 * unit :, 5 * unit : -unit] - padded[: -6 * unit, unit : -5 * unit]
    colours = pixels[..., :3] * (1 + slope / 255 * 0.3)[..., None]
    if scene.background in TINTS:
        multiply, add = (np.array(c, dtype=np.float32) for c in TINTS[scene.background])
        colours = colours * (multiply / 255) + add * alpha
    shadow = _shadow(pose, small.width) if scene.background != "sea" else 0.0
    return (np.minimum(colours, 255 * alpha) + place * (1 - shadow) * (1 - alpha) + 0.5).clip(0, 255).astype(np.uint8)


def _shadow(pose: "Pose", size: int) -> npt.NDArray[np.float32]:
    """Darkness of the ground under the creature: (size, size, 1) in [0, 0.35]."""
    rows, columns = (a.astype(np.float32)[..., None] * (SIZE / size) for a in np.mgrid[:size, :size])
    x = (columns - pose.x - 1) / (0.95 * pose.radius)
    y = (rows - pose.y - (pose.bottom + 0.02) * pose.radius) / (0.2 * pose.radius)
    return 0.35 * np.exp(-(x * x + y * y))


class Pose(NamedTuple):
    """Where the creature stands, in 64ths of the picture; angle in radians."""

    x: float
    y: float
    radius: float
    angle: float
    stoutness: float
    bottom: float
    """Where the creature touches the ground, in radii below the centre."""
    turn: float = 0.0
    """How far the face looks to the right, in radii."""
    companion_left: bool = False


class Stance(NamedTuple):
    """How a creature stands in a place, in 64ths of the picture; angle in radians, turn in radii."""

    x: float
    radius: float
    angle: float
    turn: float
    ground: float = 58.0


STANCES = {
    "plain": Stance(x=32, radius=19, angle=0, turn=0),
    "beach": Stance(x=26, radius=17, angle=-0.1, turn=0.14),
    "snow": Stance(x=38, radius=17, angle=0.14, turn=-0.14),
    "forest": Stance(x=39, radius=15.5, angle=-0.08, turn=-0.1),
    "night": Stance(x=25, radius=16, angle=0.06, turn=0.1),
    "desert": Stance(x=40, radius=16, angle=0.16, turn=0),
    "city": Stance(x=25, radius=15, angle=0, turn=0.14),
    "sea": Stance(x=33, radius=16, angle=-0.16, turn=-0.06, ground=50),
    "room": Stance(x=31, radius=18.5, angle=0.04, turn=-0.14),
    "meadow": Stance(x=37, radius=18, angle=-0.12, turn=0.06),
}
"""Of each background; a creature stands upright in the middle of a reference."""


def _sample_pose(subject: Subject, scene: Scene, rng: random.Random, moves: bool) -> Pose:
    """Nearly aligned; or moved by the scene, with room for what the prompt adds."""
    bottom = max(b for _, b in BODIES[subject.noun].outline)
    if moves:
        return _sample_moved_pose(subject, scene, rng, bottom)
    x, y, radius = rng.uniform(31, 33), rng.uniform(34.5, 36.5), rng.uniform(18.6, 19.8)
    if scene.companion:
        x, radius = x - 6.5, radius - 1.2
    if scene.accessory in ("hat", "crown"):
        y, radius = y + 2.5, radius - 1.2
    return Pose(x, y, radius, rng.uniform(-0.04, 0.04), subject.stoutness, bottom)


def _sample_moved_pose(subject: Subject, scene: Scene, rng: random.Random, bottom: float) -> Pose:
    stance, on_head = STANCES[scene.background], scene.accessory in ("hat", "crown")
    radius = min(stance.radius, 17.5 if scene.companion or on_head else 20) + rng.uniform(-0.6, 0.6)
    companion_left = scene.companion is not None and stance.x > SIZE / 2
    x = (39 if companion_left else 25) if scene.companion else stance.x
    return Pose(
        x=x + rng.uniform(-1, 1),
        y=max((1.56 if on_head else 1.36) * radius, stance.ground - bottom * radius) + rng.uniform(-0.5, 1),
        radius=radius,
        angle=stance.angle + rng.uniform(-0.04, 0.04),
        stoutness=subject.stoutness,
        bottom=bottom,
        turn=stance.turn,
        companion_left=companion_left,
    )


class Brush:
    """Draws on the large layer in body coordinates."""

    def __init__(self, draw: ImageDraw.ImageDraw, layer: Image.Image, pose: Pose) -> None:
        self.draw, self.layer, self.pose = draw, layer, pose
        self.unit = SUPERSAMPLING * (layer.width // (SIZE * SUPERSAMPLING))
        self.scale = pose.radius * self.unit
        cos, sin = math.cos(pose.angle) * self.scale, math.sin(pose.angle) * self.scale
        self._matrix = (cos * pose.stoutness, -sin / pose.stoutness, sin * pose.stoutness, cos / pose.stoutness)
        self._origin = (pose.x * self.unit, pose.y * self.unit)

    def place(self, x: float, y: float) -> Point:
        a, b, c, d = self._matrix
        return (self._origin[0] + a * x + b * y, self._origin[1] + c * x + d * y)

    def points(self, path: Sequence[Point]) -> list[Point]:
        return [self.place(x, y) for x, y in path]

    def shape(self, path: Sequence[Point], fill: Fill, outline: Colour | None = None, width: float = 1.0) -> None:
        """A filled polygon; widths are in 64ths of the picture."""
        points = self.points(path)
        self.draw.polygon(points, fill=fill)
        if outline:
            self.draw.line([*points, points[0], points[1]], fill=outline, width=round(width * self.unit), joint="curve")

    def line(self, path: Sequence[Point], colour: Colour, width: float = 1.3) -> None:
        self.draw.line(self.points(path), fill=colour, width=round(width * self.unit), joint="curve")

    def disc(
        self, x: float, y: float, rx: float, ry: float, fill: Fill, outline: Colour | None = None, width: float = 1.0
    ) -> None:
        a, b = self.place(x, y)
        box = (a - rx * self.scale, b - ry * self.scale, a + rx * self.scale, b + ry * self.scale)
        self.draw.ellipse(box, fill=fill, outline=outline, width=round(width * self.unit) if outline else 0)


# ---- Bodies


def _smooth(corners: Sequence[Point], rounds: int = 2) -> tuple[Point, ...]:
    """Chaikin's corner cutting."""
    for _ in range(rounds):
        following = [*corners[1:], corners[0]]
        corners = [
            (p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1]))
            for p, q in zip(corners, following, strict=True)
            for share in (0.25, 0.75)
        ]
    return tuple(corners)


def _closed_curve(curve: Callable[[float], Point], count: int = 44) -> tuple[Point, ...]:
    return tuple(curve(2 * math.pi * k / count) for k in range(count))


def _bean(t: float) -> Point:
    x, y = 0.74 * math.cos(t), math.sin(t)
    dent = 0.42 * math.exp(-((y / 0.42) ** 2)) * max(0.0, -math.cos(t))
    return (x + dent - 0.3 * y * y + 0.1, y)


def _pear(t: float) -> Point:
    y = math.sin(t)
    return ((0.44 + 0.44 / (1 + math.exp(-7 * (y - 0.05)))) * math.cos(t), y)


def _cloud(t: float) -> Point:
    bump = 0.17 * abs(math.sin(3.5 * t + 0.5 * math.pi))
    return ((0.95 + bump) * math.cos(t), min((0.68 + bump) * math.sin(t), 0.66))


def _egg(t: float) -> Point:
    return (0.8 * math.cos(t) * (1 + 0.17 * math.sin(t)), 0.97 * math.sin(t))


def _heart(t: float) -> Point:
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return (0.96 * math.sin(t) ** 3, -0.062 * y - 0.06)


def _star_corner(k: int) -> Point:
    length = 1.2 if k % 2 == 0 else 0.66
    return (length * math.sin(math.pi * k / 5), 0.06 - length * math.cos(math.pi * k / 5))


_DOME = [
    (0.76 * math.cos(math.pi + math.pi * k / 16), -0.16 + 0.8 * math.sin(math.pi + math.pi * k / 16)) for k in range(17)
]
_HEM = [
    (0.8, 0.95),
    (0.66, 0.98),
    (0.4, 0.66),
    (0.2, 0.98),
    (0.0, 0.98),
    (-0.2, 0.98),
    (-0.4, 0.66),
    (-0.66, 0.98),
    (-0.8, 0.95),
]


class Body(NamedTuple):
    """An outline and where things sit on it. `top` is the crown of the head, `ear_x` and `ear_y` the root of an ear."""

    outline: tuple[Point, ...]
    face_x: float
    face_y: float
    top: float
    ear_x: float
    ear_y: float
    neck: float
    """Half the width at the scarf."""


_CUBE = ((-0.84, -0.56), (-0.56, -0.88), (0.86, -0.88), (0.86, 0.56), (0.58, 0.88), (-0.84, 0.88))

BODIES: dict[str, Body] = {
    "bean": Body(_closed_curve(_bean), 0.12, -0.2, -0.92, 0.34, -0.82, 0.68),
    "star": Body(_smooth([_star_corner(k) for k in range(10)]), 0.0, -0.04, -0.96, 0.3, -0.66, 0.56),
    "cloud": Body(_closed_curve(_cloud, 84), 0.0, -0.12, -0.76, 0.48, -0.66, 0.8),
    "pear": Body(_closed_curve(_pear), 0.0, -0.22, -0.98, 0.26, -0.86, 0.68),
    "ghost": Body((*_DOME, *_smooth(_HEM, 1)[1:-2]), 0.0, -0.22, -0.95, 0.42, -0.78, 0.72),
    "cube": Body(_CUBE, -0.13, 0.02, -0.84, 0.44, -0.76, 0.8),
    "egg": Body(_closed_curve(_egg), 0.0, -0.12, -0.95, 0.36, -0.8, 0.8),
    "heart": Body(_closed_curve(_heart), 0.0, -0.22, -0.62, 0.5, -0.72, 0.62),
}


# ---- Creatures


def _draw_creature(brush: Brush, subject: Subject, scene: Scene) -> None:
    body = _turned_body(subject, brush.pose)
    colour = body_colour(subject, scene)
    same = (scene.recolour or subject.colour) == subject.pattern_colour
    second = CREAM if same else RGB[subject.pattern_colour]  # a pattern in the body's own colour could not be seen
    line = _shade(colour, 0.48)
    _draw_ears(brush, subject.ears, body, colour, second, line)
    brush.shape(body.outline, colour)
    if subject.pattern != "plain":
        _draw_pattern(brush, subject.pattern, body, second)
    if subject.noun == "cube":
        _draw_cube_edges(brush, line)
    outline = brush.points(body.outline)
    brush.draw.line([*outline, *outline[:2]], fill=line, width=round(1.35 * brush.unit), joint="curve")
    _draw_face(brush, subject, body)


def _turned_body(subject: Subject, pose: Pose) -> Body:
    body = BODIES[subject.noun]
    return body._replace(face_x=body.face_x + pose.turn)


def body_colour(subject: Subject, scene: Scene) -> Colour:
    """The colour the body is painted in before light and tint."""
    if scene.recolour:
        return RGB[scene.recolour]
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in RGB[subject.colour]))
    red, green, blue = colorsys.hsv_to_rgb(
        (hue + subject.hue_shift) % 1, saturation, min(1.0, value * subject.lightness)
    )
    return (round(255 * red), round(255 * green), round(255 * blue))


def _draw_ears(brush: Brush, ears: str, body: Body, colour: Colour, second: Colour, line: Colour) -> None:
    x, y, middle = body.ear_x, body.ear_y, body.face_x * 0.5
    for side in (-1, 1):
        root = middle + side * x
        if ears == "round":
            brush.disc(root + side * 0.06, y - 0.12, 0.29, 0.29, colour, line, 1.2)
            brush.disc(root + side * 0.06, y - 0.12, 0.15, 0.15, second)
        elif ears == "pointy":
            brush.shape(
                [(root - 0.24, y + 0.12), (root + side * 0.14, y - 0.5), (root + 0.24, y + 0.12)], colour, line, 1.2
            )
        elif ears == "horns":
            path = [(x - 0.15, y + 0.1), (x + 0.1, y - 0.22), (x + 0.34, y - 0.42), (x + 0.15, y + 0.1)]
            brush.shape([(middle + side * a, b) for a, b in path], CREAM, (150, 122, 88), 1.1)
        elif ears == "antenna":
            brush.line([(middle + side * 0.14, body.top + 0.3), (middle + side * 0.34, body.top - 0.3)], line, 1.5)
            brush.disc(middle + side * 0.36, body.top - 0.34, 0.15, 0.15, second, line, 0.8)
    if ears == "leaf":
        brush.line([(middle, body.top + 0.3), (middle, body.top - 0.2)], (92, 112, 52), 1.6)
        path = _smooth(
            [
                (middle, body.top - 0.1),
                (middle + 0.12, body.top - 0.5),
                (middle + 0.66, body.top - 0.46),
                (middle + 0.5, body.top - 0.08),
            ]
        )
        brush.shape(path, (112, 192, 82), (58, 122, 52), 1.0)


_DOTS = ((-0.62, -0.5), (0.02, -0.72), (0.58, -0.5), (-0.62, 0.3), (0.62, 0.34), (-0.22, 0.66), (0.3, 0.74), (0.0, 0.5))


def _draw_pattern(brush: Brush, pattern: str, body: Body, colour: Colour) -> None:
    """Paint the pattern, clipped to the body."""
    size = brush.layer.size
    stencil, painted = Image.new("L", size, 0), Image.new("L", size, 0)
    ImageDraw.Draw(stencil).polygon(brush.points(body.outline), fill=255)
    brush_on_painted = Brush(ImageDraw.Draw(painted), painted, brush.pose)
    if pattern == "stripes":
        for k in range(4):
            y = -0.78 + 0.52 * k
            brush_on_painted.shape([(-1.4, y - 0.13), (1.4, y - 0.13), (1.4, y + 0.13), (-1.4, y + 0.13)], 255)
    elif pattern == "dots":
        for x, y in _DOTS:
            brush_on_painted.disc(x + body.face_x * 0.5, y, 0.16, 0.16, 255)
    elif pattern == "belly":
        brush_on_painted.disc(body.face_x * 0.5, 0.58, 0.48, 0.44, 255)
    else:
        brush_on_painted.disc(body.face_x + 0.34, body.face_y - 0.04, 0.36, 0.42, 255)
    brush.layer.paste((*colour, 255), mask=ImageChops.darker(stencil, painted))


def _draw_cube_edges(brush: Brush, line: Colour) -> None:
    corner = (0.58, -0.56)
    for end in ((-0.84, -0.56), (0.86, -0.88), (0.58, 0.88)):
        brush.line([corner, end], line, 1.0)


def _draw_face(brush: Brush, subject: Subject, body: Body) -> None:
    x, y = body.face_x, body.face_y
    apart = 0.29
    if subject.eyes == "one":
        brush.disc(x, y, 0.29, 0.29, WHITE, INK, 1.0)
        brush.disc(x, y + 0.03, 0.15, 0.15, INK)
        brush.disc(x + 0.06, y - 0.04, 0.05, 0.05, WHITE)
    for side in (-1, 1):
        eye = x + side * apart
        if subject.eyes == "dots":
            brush.disc(eye, y, 0.115, 0.13, INK)
            brush.disc(eye + 0.04, y - 0.05, 0.04, 0.04, WHITE)
        elif subject.eyes == "big":
            brush.disc(eye, y, 0.23, 0.25, WHITE, INK, 0.9)
            brush.disc(eye, y + 0.03, 0.12, 0.13, INK)
        elif subject.eyes == "sleepy":
            brush.line(
                [(eye - 0.17, y - 0.03), (eye - 0.08, y + 0.08), (eye + 0.08, y + 0.08), (eye + 0.17, y - 0.03)],
                INK,
                1.5,
            )
    mouth = y + 0.42
    if subject.mouth == "smile":
        brush.shape(
            [(x + 0.23 * math.cos(t), mouth - 0.08 + 0.2 * math.sin(t)) for t in _HALF_TURN], (124, 34, 48), INK, 0.8
        )
    elif subject.mouth == "o":
        brush.disc(x, mouth, 0.12, 0.14, (124, 34, 48), INK, 0.8)
    else:
        brush.line([(x - 0.2, mouth), (x + 0.2, mouth)], INK, 1.5)
    if subject.cheeks:
        for side in (-1, 1):
            brush.disc(x + side * 0.5, y + 0.26, 0.12, 0.09, (250, 142, 148))


_HALF_TURN = [math.pi * k / 10 for k in range(11)]


# ---- What a prompt adds


def _draw_accessory(brush: Brush, subject: Subject, scene: Scene) -> None:
    body = _turned_body(subject, brush.pose)
    colour = RGB[scene.accessory_colour] if scene.accessory_colour else INK
    line = _shade(colour, 0.48)
    x = body.face_x * 0.5
    head = body.top + (0.1 if subject.noun != "heart" else -0.02) + (0.16 if subject.noun == "star" else 0.0)
    if scene.accessory == "hat":
        brush.shape(
            [(x - 0.4, head), (x + 0.4, head), (x + 0.33, head - 0.58), (x - 0.33, head - 0.58)], colour, line, 1.1
        )
        brush.shape(
            [(x - 0.39, head - 0.08), (x + 0.39, head - 0.08), (x + 0.37, head - 0.22), (x - 0.37, head - 0.22)], line
        )
        brush.shape(
            [(x - 0.72, head + 0.08), (x + 0.72, head + 0.08), (x + 0.72, head - 0.08), (x - 0.72, head - 0.08)],
            colour,
            line,
            1.1,
        )
    elif scene.accessory == "crown":
        path = [(-0.46, 0.04), (0.46, 0.04), (0.54, -0.5), (0.24, -0.22), (0, -0.56), (-0.24, -0.22), (-0.54, -0.5)]
        brush.shape([(x + a, head + b) for a, b in path], (252, 208, 66), (160, 116, 28), 1.1)
        brush.disc(x, head - 0.12, 0.09, 0.09, (222, 60, 72))
    elif scene.accessory == "sunglasses":
        face, y = body.face_x, body.face_y
        brush.line([(face - 0.62, y - 0.08), (face + 0.62, y - 0.08)], (24, 24, 32), 1.7)
        for side in (-1, 1):
            brush.disc(face + side * 0.31, y + 0.02, 0.28, 0.23, (24, 24, 32))
            brush.line(
                [(face + side * 0.31 - 0.12, y + 0.04), (face + side * 0.31 - 0.02, y - 0.08)], (150, 164, 190), 1.0
            )
    elif scene.accessory == "scarf":
        face, y, half = body.face_x, body.face_y + 0.72, body.neck
        x = body.face_x * 0.5
        brush.shape(
            [(x - half, y - 0.13), (x + half, y - 0.13), (x + half + 0.04, y + 0.13), (x - half - 0.04, y + 0.13)],
            colour,
            line,
            1.1,
        )
        brush.shape(
            [(x + 0.2, y + 0.06), (x + 0.5, y + 0.06), (x + 0.54, y + 0.5), (x + 0.24, y + 0.5)], colour, line, 1.1
        )


def _draw_companion(brush: Brush, scene: Scene, rng: random.Random) -> None:
    """To the right of an aligned creature; left or right would be one more thing for a tiny model to guess."""
    assert scene.companion_colour
    colour = RGB[scene.companion_colour]
    line = _shade(colour, 0.48)
    pose = brush.pose
    radius = rng.uniform(8.2, 9.2)
    margin = radius + rng.uniform(1.2, 2.4)
    centre = Pose(
        margin if pose.companion_left else SIZE - margin,
        pose.y + pose.radius - radius + rng.uniform(-0.5, 1.5),
        radius,
        0.0,
        1.0,
        1.0,
    )
    beside = Brush(brush.draw, brush.layer, centre)
    if scene.companion == "ball":
        beside.disc(0, 0, 0.98, 0.98, colour, line, 1.2)
        beside.disc(-0.34, -0.38, 0.26, 0.22, _lighten(colour))
    elif scene.companion == "box":
        beside.shape([(-0.86, -0.6), (0.86, -0.6), (0.86, 0.95), (-0.86, 0.95)], colour, line, 1.2)
        beside.shape([(-0.98, -0.95), (0.98, -0.95), (0.98, -0.5), (-0.98, -0.5)], _lighten(colour), line, 1.1)
        beside.line([(0, -0.5), (0, 0.95)], line, 1.6)
    else:
        beside.line([(0, 1.0), (0, -0.5)], (66, 142, 62), 2.0)
        beside.shape(_smooth([(0, 0.75), (0.15, 0.3), (0.7, 0.15), (0.5, 0.65)]), (92, 172, 82))
        for k in range(5):
            angle = 2 * math.pi * (k + 0.25) / 5
            beside.disc(0.52 * math.cos(angle), -0.62 + 0.52 * math.sin(angle), 0.4, 0.4, colour, line, 0.8)
        heart = (255, 232, 120) if scene.companion_colour != "yellow" else (204, 128, 52)
        beside.disc(0, -0.62, 0.34, 0.34, heart)


def _shade(colour: Colour, factor: float) -> Colour:
    return (round(colour[0] * factor), round(colour[1] * factor), round(colour[2] * factor))


def _lighten(colour: Colour) -> Colour:
    return (colour[0] // 2 + 127, colour[1] // 2 + 127, colour[2] // 2 + 127)


# ---- Places


class Easel(NamedTuple):
    """A large canvas in unit coordinates: x to the right, y down, both in [0, 1]."""

    canvas: Image.Image
    draw: ImageDraw.ImageDraw
    rng: random.Random
    horizon: float

    @property
    def size(self) -> int:
        return self.canvas.size[0]

    def polygon(self, path: Sequence[Point], colour: Colour) -> None:
        self.draw.polygon([(x * self.size, y * self.size) for x, y in path], fill=colour)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        s = self.size
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour, radius: float = 0.0) -> None:
        s = self.size
        self.draw.rounded_rectangle((left * s, top * s, right * s, bottom * s), radius=radius * s, fill=colour)

    def blend(self, top: float, bottom: float, first: Colour, last: Colour) -> None:
        """A vertical gradient over the whole width."""
        a, b = round(top * self.size), round(bottom * self.size)
        share = np.linspace(0, 1, max(1, b - a))[:, None, None]
        rows = np.array(first) * (1 - share) + np.array(last) * share
        self.canvas.paste(Image.fromarray(np.broadcast_to(rows, (len(rows), self.size, 3)).astype(np.uint8)), (0, a))

    def hills(self, height: float, colour: Colour) -> None:
        phase, waves = self.rng.uniform(0, 6.3), self.rng.uniform(0.8, 1.4)
        path = [
            (k / 24, self.horizon - height * (0.6 + 0.4 * math.sin(phase + waves * 6.3 * k / 24))) for k in range(25)
        ]
        self.polygon([*path, (1, self.horizon + 0.02), (0, self.horizon + 0.02)], colour)


@cache
def background(name: str, variant: int, size: int = SIZE) -> npt.NDArray[np.float32]:
    """One painted place: (size, size, 3) float32 in [0, 255], read-only."""
    rng = random.Random(f"{name} {variant}")
    canvas = Image.new("RGB", (size * PLACE_SUPERSAMPLING, size * PLACE_SUPERSAMPLING))
    easel = Easel(canvas, ImageDraw.Draw(canvas), rng, rng.uniform(0.66, 0.7))
    _PAINTERS[name](easel)
    softened = canvas.filter(ImageFilter.GaussianBlur(PLACE_SUPERSAMPLING * 0.55)).reduce(PLACE_SUPERSAMPLING)
    pixels = np.asarray(softened, dtype=np.float32)
    pixels.flags.writeable = False
    return pixels


def _plain(e: Easel) -> None:
    grey = e.rng.randint(236, 243)
    e.blend(0, 0.72, (grey, grey, grey + 2), (grey - 3, grey - 4, grey - 4))
    e.blend(0.72, 1, (grey - 12, grey - 13, grey - 14), (grey - 20, grey - 21, grey - 22))


def _beach(e: Easel) -> None:
    e.blend(0, e.horizon, (126, 200, 244), (206, 236, 248))
    e.disc(e.rng.choice([0.14, 0.2, 0.8, 0.86]), 0.15, 0.085, 0.085, (255, 236, 142))
    e.blend(e.horizon - 0.16, e.horizon, (62, 150, 212), (96, 190, 222))
    e.blend(e.horizon, 1, (248, 230, 178), (232, 204, 142))
    e.box(0, e.horizon - 0.012, 1, e.horizon + 0.012, (250, 252, 252))


def _snow(e: Easel) -> None:
    e.blend(0, e.horizon, (176, 200, 228), (222, 232, 244))
    shift = e.rng.uniform(-0.06, 0.06)
    for x, height in ((0.16 + shift, 0.42), (0.84 + shift, 0.5)):
        e.polygon([(x - 0.3, e.horizon), (x, e.horizon - height), (x + 0.3, e.horizon)], (146, 166, 198))
        e.polygon(
            [(x - 0.11, e.horizon - height * 0.64), (x, e.horizon - height), (x + 0.11, e.horizon - height * 0.64)],
            (246, 249, 254),
        )
    e.blend(e.horizon, 1, (248, 251, 255), (222, 232, 246))
    for k in range(9):
        e.disc((k * 0.37 + shift * 3 + 0.08) % 1, (k * 0.23 + 0.06) % 0.6, 0.016, 0.016, WHITE)


def _forest(e: Easel) -> None:
    e.blend(0, e.horizon, (178, 220, 186), (142, 196, 152))
    e.blend(e.horizon, 1, (98, 146, 78), (72, 118, 60))
    shift = e.rng.uniform(-0.05, 0.05)
    for x, height, green in ((0.34, 0.5, 92), (0.66, 0.54, 92), (0.1, 0.6, 74), (0.9, 0.62, 74)):
        x, base = x + shift, e.horizon + (0.03 if green == 74 else 0.0)
        e.box(x - 0.02, base - 0.12, x + 0.02, base + 0.02, (112, 82, 58))
        for level in (0.0, 0.33):
            peak = base - height + level * height
            e.polygon(
                [
                    (x - 0.1 - level * 0.12, peak + height * 0.52),
                    (x, peak),
                    (x + 0.1 + level * 0.12, peak + height * 0.52),
                ],
                (38, green + 24, 62),
            )


def _night(e: Easel) -> None:
    e.blend(0, e.horizon, (20, 22, 62), (66, 62, 128))
    shift = e.rng.uniform(-0.05, 0.05)
    for k in range(8):
        e.disc((k * 0.29 + shift + 0.1) % 1, (k * 0.17 + 0.05) % 0.5, 0.014, 0.014, (255, 250, 214))
    x = e.rng.choice([0.16, 0.84])
    e.disc(x, 0.16, 0.09, 0.09, (252, 244, 204))
    e.disc(x + 0.045, 0.135, 0.075, 0.075, (30, 31, 76))
    e.hills(0.12, (42, 46, 92))
    e.blend(e.horizon, 1, (40, 56, 76), (26, 36, 54))


def _desert(e: Easel) -> None:
    e.blend(0, e.horizon, (250, 184, 116), (255, 226, 172))
    e.disc(e.rng.choice([0.5, 0.62, 0.74]), 0.14, 0.09, 0.09, (255, 246, 206))
    e.hills(0.16, (228, 158, 96))
    e.blend(e.horizon, 1, (236, 172, 102), (214, 142, 82))
    x, y = e.rng.uniform(0.08, 0.14), e.horizon
    e.box(x - 0.035, y - 0.36, x + 0.035, y + 0.03, (88, 148, 88), 0.035)
    e.box(x + 0.02, y - 0.17, x + 0.12, y - 0.12, (88, 148, 88), 0.02)
    e.box(x + 0.075, y - 0.28, x + 0.125, y - 0.12, (88, 148, 88), 0.025)


def _city(e: Easel) -> None:
    e.blend(0, e.horizon, (184, 200, 220), (222, 226, 232))
    shift = e.rng.uniform(-0.04, 0.04)
    towers = (
        (-0.06, 0.5, (124, 132, 152)),
        (0.14, 0.34, (160, 138, 132)),
        (0.34, 0.56, (112, 126, 154)),
        (0.56, 0.4, (146, 142, 152)),
        (0.76, 0.58, (128, 118, 136)),
    )
    for left, height, colour in towers:
        left, width = left + shift, 0.2 if left != 0.76 else 0.34
        e.box(left, e.horizon - height, left + width - 0.015, e.horizon, colour)
        for row in range(int(height / 0.14)):
            for column in range(2):
                x, y = left + 0.035 + 0.08 * column, e.horizon - height + 0.045 + 0.13 * row
                e.box(x, y, x + 0.045, y + 0.06, (252, 236, 168))
    e.blend(e.horizon, 1, (112, 112, 120), (88, 88, 97))
    for k in range(4):
        e.box(0.02 + 0.28 * k + shift, 0.86, 0.16 + 0.28 * k + shift, 0.89, (236, 234, 214))


def _sea(e: Easel) -> None:
    e.blend(0, 1, (94, 192, 222), (22, 82, 148))
    e.blend(0.88, 1, (196, 186, 148), (160, 150, 122))
    shift = e.rng.uniform(-0.04, 0.04)
    for x, height, colour in (
        (0.06, 0.36, (52, 160, 112)),
        (0.14, 0.24, (74, 182, 122)),
        (0.94, 0.32, (232, 112, 122)),
        (0.86, 0.2, (244, 146, 132)),
    ):
        for k in range(9):
            sway = 0.022 * math.sin(1.1 * k + 9 * shift)
            e.disc(x + shift + sway, 0.93 - height * k / 8, 0.032 - 0.0015 * k, 0.036, colour)
    for k in range(6):
        x, y, r = (0.31 * k + 0.12 + shift) % 1, (0.37 * k + 0.08) % 0.6, 0.02 + 0.006 * (k % 3)
        e.disc(x, y, r, r, (188, 232, 244))
        e.disc(x, y, r * 0.55, r * 0.55, (112, 194, 224))


def _room(e: Easel) -> None:
    e.blend(0, e.horizon, (246, 228, 204), (240, 218, 190))
    x = e.rng.uniform(0.06, 0.12)
    e.box(x, 0.1, x + 0.27, 0.46, WHITE, 0.01)
    e.box(x + 0.03, 0.13, x + 0.125, 0.43, (166, 212, 240))
    e.box(x + 0.145, 0.13, x + 0.24, 0.43, (166, 212, 240))
    e.box(0.76, 0.14, 0.94, 0.34, (168, 122, 88), 0.01)
    e.box(0.785, 0.165, 0.915, 0.315, (236, 176, 140))
    e.blend(e.horizon, 1, (186, 132, 92), (158, 106, 70))
    e.box(0, e.horizon - 0.035, 1, e.horizon, (252, 246, 236))


def _meadow(e: Easel) -> None:
    e.blend(0, e.horizon, (148, 208, 248), (214, 238, 250))
    shift = e.rng.uniform(-0.06, 0.06)
    for x, y in ((0.2 + shift, 0.14), (0.82 + shift, 0.22)):
        for dx, radius in ((-0.08, 0.055), (0.0, 0.08), (0.085, 0.06)):
            e.disc(x + dx, y, radius, radius * 0.7, WHITE)
    e.hills(0.1, (148, 208, 112))
    e.blend(e.horizon, 1, (132, 202, 92), (96, 172, 76))
    for k in range(8):
        x, y = (0.3 * k + 0.05 + shift) % 1, e.horizon + 0.05 + (0.11 * k) % 0.25
        e.disc(x, y, 0.02, 0.02, (WHITE, (252, 222, 96), (244, 138, 172))[k % 3])


_PAINTERS: dict[str, Callable[[Easel], None]] = {
    "plain": _plain, "beach": _beach, "snow": _snow, "forest": _forest, "night": _night, "desert": _desert,
    "city": _city, "sea": _sea, "room": _room, "meadow": _meadow,
}  # fmt: skip
