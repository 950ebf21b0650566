"""Training by sentence-transformers, as a contestant of train_throughput.py."""

import time

import contestants

OPTIMIZER = dict(lr=8e-5, beta_1=0.9, beta_2=0.999, epsilon=1e-8, decay=0.01, clip=1.0)
TEMPERATURE = 0.02
MOST_TOKEN_DIFFERENCE = 0.02  # relative, between the tokenizers of the two sides


def sentence_transformers(turns, folder: str, batches: list, sizes: dict, cached: bool):
    """`batches`: of every step the (query, document) texts and their number of tokens by us."""
    contestants.quiet_torch()
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from transformers import TrainerCallback

    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    model.max_seq_length = sizes["document_length"]
    counted = {"real": 0, "slots": 0, "passes": 0}

    def count(module, args):
        mask = args[0]["attention_mask"]
        counted["real"] += int(mask.sum())
        counted["slots"] += mask.numel()

    model[0].register_forward_pre_hook(count)
    make = (
        losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
    )
    loss = make(model, scale=1 / TEMPERATURE)
    candidates = list(sizes["mini_batch_sizes"]) if cached else [sizes["batch_size"]]
    # The first batch once to warm up and, if there is a choice, once for every candidate.
    trials = len(candidates) if len(candidates) > 1 else 0
    order = [0] * (1 + trials) + list(range(1, len(batches)))
    texts = [pair for step in order for pair in batches[step][0]]
    tokens = [batches[step][1] for step in order]
    dataset = Dataset.from_dict(
        {"query": [query for query, _ in texts], "document": [doc for _, doc in texts]}
    )

    class InOrder(DefaultBatchSampler):
        def __iter__(self):
            rows = range(len(texts))
            return iter([list(rows[i : i + self.batch_size]) for i in rows[:: self.batch_size]])

    class Rounds(TrainerCallback):
        """Tries the candidates, then sleeps between turns; never between step and next batch."""

        def __init__(self):
            self.done = 0
            self.seconds = []
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.done += 1
            if self.done <= 1 + trials:
                now = time.perf_counter()
                self.seconds.append(now - self.begin)
                if self.done <= trials:
                    loss.mini_batch_size = candidates[self.done - 1]
                elif cached:
                    trial_seconds = dict(zip(candidates, self.seconds[1:], strict=False))
                    best = min(trial_seconds, key=trial_seconds.get) if trials else candidates[0]
                    loss.mini_batch_size = best
                if self.done == 1 + trials:
                    result = {"trials": dict(zip(candidates, self.seconds[1:], strict=False))}
                    result["first_loss"] = first_loss[0]
                    result["mini_batch_size"] = loss.mini_batch_size if cached else None
                    self.next_turn(result)
                self.begin = time.perf_counter()
                return
            played = self.done - 1 - trials
            if played % sizes["steps"] == 0:
                seconds = turns.seconds()
                ours = sum(tokens[self.done - sizes["steps"] : self.done])
                theirs = counted["real"] / (2 if cached else 1)
                if abs(theirs / ours - 1) > MOST_TOKEN_DIFFERENCE:
                    raise RuntimeError(f"{theirs} tokens by their tokenizer, {ours} by ours")
                result = seconds | {"tokens": ours, "tokens_by_their_tokenizer": theirs}
                result |= {"slots": counted["slots"] / (2 if cached else 1), "loss": last_loss[0]}
                self.next_turn(result)

        def next_turn(self, result):
            turns.wait(result)
            counted.update(real=0, slots=0)

    first_loss, last_loss = [], [None]

    class Trainer(SentenceTransformerTrainer):
        def compute_loss(self, *args, **kwargs):
            value = super().compute_loss(*args, **kwargs)
            last_loss[0] = value.detach().item()
            if not first_loss:
                first_loss.append(last_loss[0])
            return value

    with contestants.temporary_folder() as output:
        trainer = Trainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=output,
                per_device_train_batch_size=sizes["batch_size"],
                max_steps=len(order),
                learning_rate=OPTIMIZER["lr"],
                lr_scheduler_type="constant",
                adam_beta1=OPTIMIZER["beta_1"],
                adam_beta2=OPTIMIZER["beta_2"],
                adam_epsilon=OPTIMIZER["epsilon"],
                weight_decay=OPTIMIZER["decay"],
                max_grad_norm=OPTIMIZER["clip"],
                batch_sampler=InOrder,
                prompts={"query": sizes["prefixes"][0], "document": sizes["prefixes"][1]},
                use_cpu=True,
                bf16=sizes["dtype"] == "bfloat16",
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                eval_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=dataset,
            loss=loss,
            callbacks=[Rounds()],
        )
        trainer.train()
