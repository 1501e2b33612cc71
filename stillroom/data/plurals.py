"""English nouns and their plurals: a small set of string tasks with general rules, narrower rules and exceptions to both."""

from __future__ import annotations

_ADD_S = """
book cat dog table tree river stone cloud garden window paper pencil bottle shirt jacket button engine doctor teacher winter
mountain lamp chair flower bridge apple letter number song ship train road farm island market planet signal hammer basket ticket
boy day key toy monkey valley donkey turkey holiday essay
roof chief cliff proof belief
piano photo radio studio zoo video
"""
_ADD_ES = """
box fox tax mix bus glass class kiss dress cross church bench branch match watch beach lunch dish brush bush wish flash crash
buzz waltz quiz
potato tomato hero echo torpedo veto
"""
_Y_TO_IES = """
city baby lady party story country family body army enemy berry cherry copy duty fairy hobby jury pony puppy spy theory
"""
_F_TO_VES = "leaf loaf thief half calf wolf shelf elf knife life wife"
_PAIRS = """
man men woman women fireman firemen postman postmen cactus cacti fungus fungi nucleus nuclei radius radii stimulus stimuli
crisis crises thesis theses basis bases oasis oases analysis analyses hypothesis hypotheses phenomenon phenomena criterion criteria
bacterium bacteria datum data medium media stratum strata foot feet tooth teeth goose geese mouse mice child children ox oxen
sheep sheep deer deer fish fish
"""


def plurals() -> list[tuple[str, str]]:
    """All 155 (singular, plural) pairs, each noun once."""
    pairs = [(noun, noun + "s") for noun in _ADD_S.split()]
    pairs += [(noun, "quizzes" if noun == "quiz" else noun + "es") for noun in _ADD_ES.split()]
    pairs += [(noun, noun[:-1] + "ies") for noun in _Y_TO_IES.split()]
    pairs += [(noun, noun.removesuffix("e")[:-1] + "ves") for noun in _F_TO_VES.split()]
    others = _PAIRS.split()
    return pairs + list(zip(others[::2], others[1::2]))
