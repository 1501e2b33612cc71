"""English nouns and their plurals: a small set of string tasks with general rules, narrower rules and exceptions to both."""

from __future__ import annotations

_REGULAR = """
book cat dog table tree river stone cloud garden window paper pencil bottle shirt jacket button engine doctor teacher winter
mountain lamp chair flower bridge apple letter number song ship train road farm island market planet signal hammer basket ticket
""".split()
_ES = """
box fox tax mix bus glass class kiss dress cross church bench branch match watch beach lunch dish brush bush wish flash crash
buzz waltz quiz-zes
""".split()
_Y = """
city baby lady party story country family body army enemy berry cherry copy duty fairy hobby jury pony puppy spy theory
""".split()
_VOWEL_Y = "boy day key toy monkey valley donkey turkey holiday essay".split()
_F = "leaf loaf thief half calf wolf shelf elf knife life wife".split()
_F_S = "roof chief cliff proof belief".split()
_O = "potato tomato hero echo torpedo veto".split()
_O_S = "piano photo radio studio zoo video".split()
_PAIRS = """
man men woman women fireman firemen postman postmen cactus cacti fungus fungi nucleus nuclei radius radii stimulus stimuli
crisis crises thesis theses basis bases oasis oases analysis analyses hypothesis hypotheses phenomenon phenomena criterion criteria
bacterium bacteria datum data medium media stratum strata foot feet tooth teeth goose geese mouse mice child children ox oxen
sheep sheep deer deer fish fish
""".split()


def plurals() -> list[tuple[str, str]]:
    """All (singular, plural) pairs, each noun once."""
    pairs = [(noun, noun + "s") for noun in _REGULAR + _VOWEL_Y + _F_S + _O_S]
    pairs += [(noun.split("-")[0], noun.replace("-", "") if "-" in noun else noun + "es") for noun in _ES + _O]
    pairs += [(noun, noun[:-1] + "ies") for noun in _Y]
    pairs += [(noun, noun.removesuffix("e")[:-1] + "ves") for noun in _F]
    return pairs + list(zip(_PAIRS[::2], _PAIRS[1::2]))
