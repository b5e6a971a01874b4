"""Pretrain a hybrid from scratch: documents → packed rows → steps → a Hugging Face checkpoint."""

from qlatrain.config import PretrainConfig
from qlatrain.data import build_data, check_vocab
from qlatrain.files import folder_written_aside, write_aside
from qlatrain.metrics.bigram import BigramByteModel
from qlatrain.metrics.flops import FlopCounter
from qlatrain.models import HybridForCausalLM, save_pretrained
from qlatrain.training.loop import Session, TrainingLoop
from qlatrain.training.sampling import sample

BIGRAM_BYTES = 50_000_000  # of training text that the baseline is fitted on


def main(config: PretrainConfig) -> None:
    seed, sampling = config.train.seed, config.sample

    # ---------------------------------------------------------------- where to go on from, and on which devices
    session = Session.begin(config)
    run_dir = session.run_dir

    # ---------------------------------------------------------------- documents
    data = build_data(config.data, seed)
    tokenizer = data.tokenizer
    check_vocab(tokenizer, config.model.vocab_size)
    bytes_per_token = data.validation.bytes_per_token(config.validation.rows)
    bigram = BigramByteModel(data.train.documents(BIGRAM_BYTES)).bits_per_byte(data.validation.documents())

    # ---------------------------------------------------------------- model
    model = HybridForCausalLM(config.model, config.kernel, seed=seed)

    # ---------------------------------------------------------------- train
    loop = TrainingLoop(session, config, model, data, FlopCounter(config.model), bytes_per_token, bigram)
    if not loop.run():
        return

    # ---------------------------------------------------------------- what came out
    loop.validate()
    if session.layout.is_main:
        with folder_written_aside(run_dir / "model") as folder:
            save_pretrained(model, folder, tokenizer.bos_id, tokenizer.eos_id)
            tokenizer.save_pretrained(folder)
        texts = [
            prompt + sample(model, tokenizer, tokenizer.encode_prompt(prompt), sampling, seed)
            for prompt in sampling.prompts
        ]
        write_aside(run_dir / "samples.txt", "\n\n────\n\n".join(texts) + "\n")
    loop.finish({"model": run_dir / "model", "picture": run_dir / "loss.png", "samples": run_dir / "samples.txt"})
