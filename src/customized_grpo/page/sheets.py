"""Images in rows, as one image with captions."""

from PIL import Image, ImageDraw, ImageFont

CELL = 128
GAP = 4
HEADER = 22


def grid(rows: list[list[Image.Image]], headers: list[str], captions: list[str]) -> Image.Image:
    """A table of images: one header per column, one caption (the prompt) under every row."""
    columns = max(len(row) for row in rows)
    width, line = columns * (CELL + GAP) + GAP, CELL + HEADER + GAP
    sheet = Image.new("RGB", (width, HEADER + len(rows) * line + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, header in enumerate(headers):
        draw.text((GAP + column * (CELL + GAP) + CELL / 2, HEADER / 2), header, fill="#333333", font=font, anchor="mm")
    for index, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = HEADER + index * line
        for column, image in enumerate(row):
            sheet.paste(fit(image), (GAP + column * (CELL + GAP), top))
        text = " ".join(caption.split())[:width]  # no character is narrower than a pixel
        while draw.textlength(text, font=font) > width - 2 * GAP and len(text) > 4:
            text = text[:-5] + "..."
        draw.text((GAP + 2, top + CELL + HEADER / 2), text, fill="#333333", font=font, anchor="lm")
    return sheet


def fit(image: Image.Image) -> Image.Image:
    """Into a CELL x CELL square, aspect kept; small images are enlarged without blur."""
    image = image.convert("RGB")
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (CELL, CELL), "white")
    square.paste(resized, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return square
