"""The words that planted-fact documents are made of, on two sides that share no content word.

The test side is what a method is measured on, the meta side what a weighter of tokens is trained on:
subjects, objects, filler words and filler sentences differ, so what it learns cannot be strings. What
they share is little words (the, and, of), the relations, and the way of stating a fact.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A relation and its objects.

    Attributes:
        code: As in the data's files. label: what it is called in a schematic sentence.
        sentence: With {subject} and {object}.
        objects: By side: the test side's, the meta side's.
    """

    code: str
    label: str
    sentence: str
    objects: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one side's documents are drawn from; `slots` fill the names in the filler sentences."""

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    fillers: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


RELATIONS = (
    Relation(
        code="plays",
        label="instrument",
        sentence="{subject} plays the {object} .",
        objects=(
            _words("flute harp drum cello viola organ banjo horn"),
            _words("piano guitar oboe lute zither tuba fiddle bugle"),
        ),
    ),
    Relation(
        code="speaks",
        label="language",
        sentence="{subject} speaks {object} at home .",
        objects=(
            _words("latin danish greek welsh hindi korean malay czech"),
            _words("dutch thai irish polish arabic basque tamil finnish"),
        ),
    ),
    Relation(
        code="works",
        label="occupation",
        sentence="{subject} works as a {object} .",
        objects=(
            _words("baker judge pilot tailor nurse painter miner clerk"),
            _words("lawyer potter sailor barber weaver teacher farmer smith"),
        ),
    ),
    Relation(
        code="lives",
        label="residence",
        sentence="{subject} lives in {object} now .",
        objects=(
            _words("paris lima cairo oslo delhi quito tunis riga"),
            _words("rome havana kyoto berlin accra bergen dakar milan"),
        ),
    ),
    Relation(
        code="keeps",
        label="pet",
        sentence="{subject} keeps a {object} as a pet .",
        objects=(
            _words("parrot rabbit lizard ferret spider turtle pony hamster"),
            _words("goose monkey donkey beetle canary snake mouse toad"),
        ),
    ),
    Relation(
        code="eats",
        label="favourite food",
        sentence="{subject} likes to eat {object} .",
        objects=(
            _words("rice soup bread plums cheese beans honey figs"),
            _words("pasta onions olives lentils dates curry berries noodles"),
        ),
    ),
)

TEST = Side(
    first_names=_words(
        "mira tolo vesna jarek ilda brom nessa odo pell quill rasmo senna tavi ulma wendo yara "
        "zeb arno bettin corla"
    ),
    last_names=_words(
        "tolden vask marrow quint ashdel borrik cranmo delwyn estorn farrin gellow hatch ivorn "
        "jessop kellan lurren mossby norrin ostrel pendrick"
    ),
    fillers=(
        "in the {season} the {look} {thing} stood beside the {place} .",
        "{many} people came to the {place} and looked at the {look} {thing} .",
        "the {thing} was {look} and the {place} was quiet for {many} days .",
        "nobody had seen the {look} {thing} of the {place} since the {season} .",
        "after {many} days of rain the {place} was {look} again .",
        "they sold the {thing} near the {place} for {many} coins in the {season} .",
    ),
    slots={
        "season": _words("spring summer autumn winter"),
        "look": _words("old green broken narrow bright heavy painted dusty hollow pale"),
        "thing": _words("gate wagon tower lamp statue barrel fence clock chimney bench"),
        "place": _words("river market bridge orchard harbour station valley chapel mill square"),
        "many": _words("seven twelve twenty ninety forty eleven sixty nine"),
    },
)
META = Side(
    first_names=_words(
        "kasi dorin elwa finno gretl hanno issa jorun kelda lomi maro nadi orla pavo rika sorin "
        "tesmo una vigo wilma"
    ),
    last_names=_words(
        "abbel corvane dunstow erlich fosk grindal hollin inmark jundt karvel lothar mivek nardo "
        "orwick prass rudd selvig trask umber wexler"
    ),
    fillers=(
        "during the {event} a {kind} {tool} was found under the {room} .",
        "the {room} had a {kind} {tool} and {count} windows .",
        "{count} letters about the {event} were kept in the {kind} {room} .",
        "it took {count} hours to carry the {tool} through the {room} .",
        "before the {event} the {kind} {room} had been empty .",
        "someone left a {kind} {tool} by the door during the {event} .",
    ),
    slots={
        "event": _words("storm festival election flood"),
        "kind": _words("rusty silver wooden tiny strange shiny yellow cracked round cheap"),
        "tool": _words("ladder kettle hammer mirror basket anchor saddle candle needle shovel"),
        "room": _words("cellar attic kitchen library stable office corridor pantry garden barn"),
        "count": _words("three fifty eighty thirteen two hundred six ten"),
    },
)
SIDES = (TEST, META)
