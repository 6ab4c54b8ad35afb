"""Language reward models: a causal language model, or a classifier, with a head that gives texts numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.errors import RewardError
from tiltflow.scorers.language_head import RewardHead
from tiltflow.scorers.language_loading import load_classifier, save_classifier, unread_token, write_head
from tiltflow.scorers.language_lora import LoraSettings, add_lora, has_lora, save_lora, without_lora
from tiltflow.scorers.language_text import Message, Text, TextEncoder
from tiltflow.scorers.length_buckets import length_buckets, pad_rows, token_batches
from tiltflow.types import DTYPES

SCORING_TOKENS = 16_384  # that one call of the network gets, padding included


class LanguageRewardModel(nn.Module):
    """A transformers sequence classifier that gives every text a score.

    score = W h with h the hidden state, after the last norm, of the text's last token: the last one that the attention
    mask shows, on whichever side the padding is. There is no bias, as in transformers' own classifiers, so that a saved
    folder is one of them. Classifiers that are no causal language models (BERT and its like) keep their own head.

    Scores do not depend on the batch: texts are moved to the left before the network sees them, so that their positions
    count from 0, and no real token sees padding.
    """

    attribute_weights: Tensor  # [A] float32

    def __init__(self, network: Any, tokenizer: Any, head: RewardHead | None = None):
        """Wrap a classifier; most call `from_pretrained`.

        Args:
            network: A sequence classifier of transformers, maybe in peft's LoRA.
            tokenizer: Its tokenizer; the texts it makes are what is scored.
            head: What the classifier gives; as many attributes as it has labels. None takes the defaults.

        Raises:
            RewardError: The head does not fit the classifier, or there is no padding token.
        """
        super().__init__()
        classifier = without_lora(network)
        head = RewardHead(num_attributes=classifier.config.num_labels) if head is None else head
        if head.num_attributes != classifier.config.num_labels:
            raise RewardError(
                f"the head of {type(classifier).__name__} gives {classifier.config.num_labels} numbers for "
                f"num_attributes={head.num_attributes}; set that, or ask for a new head"
            )
        if tokenizer.pad_token_id is None:
            raise RewardError(
                f"the tokenizer of {type(classifier).__name__} has no padding token, by which transformers finds the "
                "last token of a text; load the model with LanguageRewardModel.from_pretrained, which gives it one"
            )
        # In causal classifiers the head is a layer of its own; the others have more behind the network, and keep it.
        self.reads_last_token = "score" in dict(classifier.named_children())
        if not self.reads_last_token and head.average_pooling:
            raise RewardError(
                f"average_pooling=True: {type(classifier).__name__} has a head of its own, which reads what it reads"
            )
        self.network = network
        self.tokenizer = tokenizer
        self.head = head
        self.texts = TextEncoder(tokenizer, unread=unread_token(classifier))
        self.register_buffer("attribute_weights", head.weights(), persistent=False)
        if self.reads_last_token:
            classifier.score.to(DTYPES[head.dtype])

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        head: RewardHead | Mapping[str, Any] | None = None,
        new_head: bool = False,
        require_head: bool = False,
        seed: int = 0,
        append_eos: bool = False,
        dropout: bool = True,
        attn_implementation: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "LanguageRewardModel":
        """Load a causal language model, which gets a new head, a sequence classifier, or a saved LoRA adapter.

        Args:
            folder: In Hugging Face format, or a hub repository in the models folder or the cache.
            head: What the head gives, or what of it is other than the folder says; None changes nothing.
            new_head: Begin with a new head even if the folder has one.
            require_head: Refuse a folder without a head, whose rewards would be those of a drawn one.
            seed: Of a new head's weights, N(0, 1 / (width + 1)^2): rewards start near 0.
            append_eos: Let the tokenizer end every text, but no conversation, with its end-of-text token.
            dropout: Keep the model's dropout, which acts in training mode only.
            attn_implementation: transformers' own; None lets it choose.
            device: Where to compute.
            dtype: Of the network; the head has its own.

        Raises:
            RewardError: There is no such model, it cannot be a sequence classifier, weights are missing, or it has a
                head that is none of transformers'.
        """
        loaded = load_classifier(
            folder,
            head=head,
            new_head=new_head,
            require_head=require_head,
            seed=seed,
            append_eos=append_eos,
            dropout=dropout,
            attn_implementation=attn_implementation,
            dtype=dtype,
        )
        return cls(loaded.network, loaded.tokenizer, loaded.head).to(device)

    @property
    def classifier(self) -> Any:
        """The classifier itself, LoRA in its layers if there is any."""
        return without_lora(self.network)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which the network, without the head, computes."""
        return next(self.network.parameters()).dtype

    @property
    def max_positions(self) -> int | None:
        """How many tokens the network can read; None where nothing limits it."""
        config = self.classifier.config.get_text_config()
        name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")  # GPT-2: n_positions
        found = config.to_dict().get(name)
        return found if found is None else found - _unused_positions(self.classifier.base_model)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """What the numbers of the head are called."""
        labels = self.classifier.config.id2label
        return self.head.attribute_names or tuple(str(labels[place]) for place in range(self.head.num_attributes))

    @property
    def takes_conversations(self) -> bool:
        """Whether a prompt and an answer go through the chat template: what training did, or if there is one."""
        known = self.head.as_conversation
        return self.tokenizer.chat_template is not None if known is None else known

    def pair(self, prompt: str, answer: str) -> Text:
        """Return a prompt and an answer as the model takes them: a conversation, or one text after the other."""
        if not self.takes_conversations:
            return prompt + answer
        return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})

    def encode(self, text: Text) -> list[int]:
        """Return the tokens of a text as the folder's tokenizer makes them; a conversation goes through its template.

        A text gets no special token with which it begins or ends already, and none at all from a model that was
        trained on conversations: its texts are conversations that were rendered elsewhere.

        Where a classifier takes its end-of-text token for padding, as some published reward models do, the end is left
        out: transformers could not tell it from padding either.

        Raises:
            RewardError: There is no chat template for a conversation, it refuses the conversation, the text is no
                Unicode text, or nothing is left.
        """
        return self.texts.encode(text, self.head)

    def shortened(self, ids: list[int], length: int) -> list[int]:
        """Return the beginning of a text, at most `length` tokens; what the tokenizer ends texts with stays its end."""
        return self.texts.shortened(ids, length)

    def render(self, conversation: Sequence[Message]) -> str:
        """Return a conversation as text.

        Raises:
            RewardError: There is no chat template, or it refuses the conversation.
        """
        return self.texts.render(conversation, self.head.chat_template_kwargs)

    @torch.no_grad()
    def score(self, texts: Sequence[Text], *, max_tokens: int = SCORING_TOKENS) -> Tensor:
        """Return the scores, float32 `[B]`, or `[B, A]` of a model with attributes that are not merged.

        Args:
            texts: B texts or conversations.
            max_tokens: In one call of the network, padding included; a longer text goes alone.

        Raises:
            RewardError: A text cannot be encoded.
        """
        return self.score_encoded([self.encode(text) for text in texts], max_tokens=max_tokens)

    @torch.no_grad()
    def score_encoded(self, rows: Sequence[Sequence[int]], *, max_tokens: int = SCORING_TOKENS) -> Tensor:
        """Return the scores, float32 `[B]` or `[B, A]`, of B rows of tokens of any lengths."""
        return self.merged(self.attributes(rows, max_tokens=max_tokens))

    @torch.no_grad()
    def attributes(self, rows: Sequence[Sequence[int]], *, max_tokens: int = SCORING_TOKENS) -> Tensor:
        """Return the attributes, float32 `[B, A]`, of B rows of tokens of any lengths."""
        found = torch.zeros(len(rows), self.head.num_attributes, device=self.device)
        for places in token_batches([len(row) for row in rows], max_tokens=max_tokens):
            ids, lengths = self.pad([rows[place] for place in places])
            found[places] = self(ids.to(self.device), lengths.to(self.device))
        return found

    def score_sequence(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return a score for every token, attributes merged, float32 `[B, S]`; 0 where there is padding.

        Args:
            input_ids: `[B, S]`, padded on either side.
            attention_mask: 1 for real tokens, 0 for padding, `[B, S]`.

        Raises:
            RewardError: A row has no real token, or the classifier is none of causal language models.
        """
        if not self.reads_last_token:
            raise RewardError(f"{type(self.classifier).__name__} scores whole texts; it has no score for a token")
        ids, lengths, order = _to_the_left(input_ids, attention_mask)
        scores = self.weighted(self._apply_head(self._hidden(ids, lengths)))
        return torch.zeros_like(scores).scatter(1, order, scores) * (attention_mask > 0)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the attributes of texts that are padded on the right, float32 `[B, A]`.

        Args:
            input_ids: `[B, S]`; what follows a text is not looked at.
            lengths: Tokens of each text, from 1 to S, `[B]`.
        """
        if not self.reads_last_token:
            return self.classifier(input_ids=input_ids, attention_mask=_mask(input_ids, lengths)).logits.float()
        hidden = self._hidden(input_ids, lengths)
        if self.head.average_pooling:
            inside = _mask(input_ids, lengths).unsqueeze(-1)
            # Summed in float32: in bfloat16 a thousand states would not add up.
            read = torch.where(inside > 0, hidden.float(), 0.0).sum(1) / lengths.unsqueeze(-1)
        else:
            read = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        return self._apply_head(read)

    def score_rows(
        self, input_ids: Tensor, lengths: Tensor, *, buckets: int, overhead: int, steady: bool = False
    ) -> Tensor:
        """Return the same as `forward`, the rows cut into buckets of similar length so that padding costs little.

        Args:
            input_ids: `[B, S]`, padded on the right.
            lengths: `[B]`.
            buckets: Calls of the network at most.
            overhead: What a call costs beside its tokens, in tokens.
            steady: Make exactly `buckets` calls whatever the lengths, as processes that share weights must.
        """
        counts = lengths.tolist()
        places = length_buckets(counts, most=buckets, overhead=0 if steady else overhead)
        parts = []
        for part in places:
            rows = torch.tensor(part, device=input_ids.device)
            longest = max(counts[place] for place in part)
            parts.append(self(input_ids[rows, :longest], lengths[rows]))
        if steady:
            one = torch.ones_like(lengths[:1])
            parts += [0.0 * self(input_ids[:1, :1], one)[:0] for _ in range(buckets - len(places))]
        order = [place for part in places for place in part]
        back = torch.empty(len(order), dtype=torch.long, device=input_ids.device)
        back[torch.tensor(order, device=input_ids.device)] = torch.arange(len(order), device=input_ids.device)
        return torch.cat(parts)[back]

    def merged(self, attributes: Tensor) -> Tensor:
        """Return `[B, A]` as `[B]` if the head gives one number, else as it is."""
        return self.weighted(attributes) if self.head.scalar else attributes

    def weighted(self, attributes: Tensor) -> Tensor:
        """Return the weighted sum of attributes, `[..., A]` to `[...]`."""
        return (attributes * self.attribute_weights).sum(-1)  # no matrix product: autocast would round it

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return rows of tokens padded on the right, int64 `[B, S]`, and their lengths, int64 `[B]`, on the CPU."""
        return pad_rows(rows, self.tokenizer.pad_token_id)

    def save_pretrained(self, folder: Path) -> None:
        """Write a plain transformers sequence classifier with its tokenizer; LoRA is merged, and this model keeps it.

        `AutoModelForSequenceClassification` loads it and gives the same attributes, unless the head averages hidden
        states, which only this class does.
        """
        save_classifier(self.network, self.tokenizer, self.head, folder)

    @property
    def has_lora(self) -> bool:
        """Whether low-rank updates are trained instead of all weights."""
        return has_lora(self.network)

    def add_lora(self, settings: LoraSettings, *, seed: int = 0) -> None:
        """Train low-rank updates, and the head in full, instead of all weights.

        Raises:
            RewardError: No layer has such a name, or there is LoRA already.
        """
        if self.has_lora:
            raise RewardError(
                "the model has LoRA already, which is trained on: leave `lora` out, or begin with the merged model"
            )
        self.network = add_lora(self.network, settings, seed=seed)

    def save_adapter(self, folder: Path) -> None:
        """Write LoRA and the head alone, with the tokenizer; `from_pretrained` puts them on the model they are for.

        Raises:
            RewardError: There is no LoRA.
        """
        save_lora(self.network, folder)
        write_head(self.head, self.classifier.config, folder)
        self.tokenizer.save_pretrained(folder)

    def _hidden(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the last hidden states, `[B, S, width]`."""
        mask = _mask(input_ids, lengths)
        return self.classifier.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state

    def _apply_head(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # the head computes in its own precision
            return self.classifier.score(hidden.to(DTYPES[self.head.dtype])).float()


def _unused_positions(network: Any) -> int:
    """Return how many rows of a position table no token reads: RoBERTa and its like count on from the padding row."""
    tables = [layer for name, layer in network.named_modules() if name.endswith("position_embeddings")]
    rows = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return max((row + 1 for row in rows if row is not None), default=0)


def _mask(input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Return 1 for the tokens of each text and 0 after them, int64 `[B, S]`."""
    return (torch.arange(input_ids.shape[1], device=input_ids.device) < lengths.unsqueeze(1)).long()


def _to_the_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens with all padding behind them, `[B, S]`, their number, `[B]`, and where each was, `[B, S]`."""
    lengths = (attention_mask > 0).sum(1)
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise RewardError(f"row {row} of the batch has no real token: its attention mask is zero; leave it out")
    order = (attention_mask <= 0).long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), lengths, order
