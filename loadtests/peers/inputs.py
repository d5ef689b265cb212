"""The requests that every peer gets: sentences of twelve words, texts of 5 to 250 tokens, and four numbers."""

from __future__ import annotations

import random

#: Common words, nearly all of them one token, so that words count tokens.
_WORDS = """
the of and to in is you that it was for on are with as his they be at one have this from by hot word but what
some we can out other were all there when up use your how said an each she which do their time if will way about
many then them write would like so these her long make thing see him two has look more day could go come did
number sound no most people my over know water than call first who may down side been now find any new work part
take get place made live where after back little only round man year came show every good me give our under name
very through just form sentence great think say help low line differ turn cause much mean before move right boy
old too same tell does set three want air well also play small end put home read hand port large spell add even
land here must big high such follow act why ask men change went light kind off need house picture try us again
animal point mother world near build self earth father head stand own page should country found answer school
grow study still learn plant cover food sun four between state keep eye never last let thought city tree cross
farm hard start might story saw far sea draw left late run while press close night real life few north open seem
together next white children begin got walk example ease paper group always music those both mark often letter
until mile river car feet care second book carry took science eat room friend began idea fish mountain stop once
base hear horse cut sure watch
""".split()  # noqa: SIM905

COUNT = 256


def sentences() -> list[str]:
    """Return distinct sentences of twelve words."""
    return _texts([12] * COUNT)


def mixed() -> list[str]:
    """Return distinct texts of 5 to 250 tokens, uniformly, the two special tokens included."""
    pick = random.Random(5)
    return _texts([pick.randint(3, 248) for _ in range(COUNT)])


def numbers() -> list[list[float]]:
    """Return distinct rows of four numbers that a float32 holds exactly."""
    return [[float(row), row + 0.25, row + 0.5, -row - 0.75] for row in range(COUNT)]


def _texts(lengths: list[int]) -> list[str]:
    pick = random.Random(7)
    return [" ".join(pick.choices(_WORDS, k=length)) for length in lengths]
