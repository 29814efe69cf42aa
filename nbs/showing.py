"Helpers that the notebooks from 07 on share: fewer messages, errors shown instead of raised, and pictures made without a screen."

import logging
import re
import tempfile
import warnings


def hush():
    "No warnings, log lines and progress bars: a stored output holds results only."
    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def shows_error(call, *parts, kind=ValueError):
    "Print the error that `call` raises; fail if there is none or if one of the parts is missing in it."
    try:
        call()
    except kind as error:
        print(f"{type(error).__name__}:", re.sub(rf"{tempfile.gettempdir()}/tmp\w+", "runs", str(error)))
        assert all(part in str(error) for part in parts), parts
    else:
        raise AssertionError("no error")


def show(figure, dpi=80, colors=128):
    "A figure that pyplot does not know of, as a small PNG: so many colours, chosen so that none is far from its own."
    import io

    from IPython.display import Image
    from PIL import Image as Picture

    figure.savefig(drawn := io.BytesIO(), format="png", dpi=dpi)
    Picture.open(drawn).convert("RGB").quantize(
        colors, Picture.Quantize.MAXCOVERAGE, kmeans=1, dither=Picture.Dither.NONE
    ).save(small := io.BytesIO(), format="png", optimize=True)
    return Image(small.getvalue())


def show_tables(*texts):
    "Print lines of text, but show Markdown tables as tables and headings in bold, on the site and in JupyterLab alike."
    from IPython.display import Markdown, display

    for part in re.findall(r"(?:^\|.*\n)+|(?:^(?!\|).*\n)+", "\n".join(texts) + "\n", re.M):
        if part.startswith("|"):
            display(Markdown(part))
            continue
        for line in filter(str.strip, part.splitlines()):
            display(Markdown(f"**{line.lstrip('# ')}**")) if line.startswith("#") else print(line)
