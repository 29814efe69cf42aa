"How the book shows pictures that were made without a screen."

import io

from IPython.display import Image
from PIL import Image as Picture


def show(figure, dpi=80):
    "A figure that pyplot does not know of, as a small PNG of 64 colours."
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=dpi)
    Picture.open(drawn).convert("RGB").quantize(64, dither=Picture.Dither.NONE).save(small := io.BytesIO(), format="png", optimize=True)
    return Image(small.getvalue())
