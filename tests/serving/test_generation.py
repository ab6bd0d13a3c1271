"""The end of a text at a stop string, however the text comes in pieces."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mlx_slm.serving.generation import until


@dataclass
class Piece:
    text: str
    finish_reason: str | None = None


class Context:
    stopped = False

    def stop(self):
        self.stopped = True


LETTERS = st.text("ab", max_size=6)


@given(st.lists(LETTERS, min_size=1, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_where_the_first_stop_string_begins(pieces, stops):
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    context = Context()
    responses = [Piece(text, "length" if i == len(pieces) - 1 else None) for i, text in enumerate(pieces)]
    given_out = list(until(stops, context, iter(responses)))
    text = "".join(piece.text for piece in given_out)
    # A stop string is found when its end has come, so an earlier one that ends later may be cut first.
    assert text == whole if not places else whole.startswith(text) and not any(stop in text for stop in stops)
    assert context.stopped == bool(places)
    assert given_out[-1].finish_reason == (None if places else "length")


@given(st.lists(LETTERS, min_size=1, max_size=8), st.text("ab", min_size=1, max_size=4))
def test_one_stop_string_cuts_at_its_first_place(pieces, stop):
    whole = "".join(pieces)
    responses = [*map(Piece, pieces), Piece("", "stop")]
    text = "".join(piece.text for piece in until([stop], Context(), iter(responses)))
    assert text == whole.partition(stop)[0]
