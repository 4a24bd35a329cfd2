#!/usr/bin/env python3
"""Writes the texts and the questions of the evaluation in docs/results.md: `make.py FOLDER`, then
`landmarkdb eval questions FOLDER/questions.json`.

Three lengths, each of three texts: `short` are the three texts beside this file (about 1,000 tokens together), `middle` (5,000) and
`long` (30,000) are pieces of Persuasion. In each of the long ones three paragraphs that we wrote stand between those of the novel, at
the beginning, in the middle and at the end. Every question is asked of the three texts of its length, in the same order; a last one
of one text alone.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOVEL = HERE.parent / "persuasion.txt"
PLACES = ["beginning", "middle", "end"]

# Length: characters of each text, and where in the novel the first one begins.
LENGTHS = {"middle": (6_900, 20_000), "long": (42_000, 90_000)}

# (paragraph, question, what a right answer holds): beginning, middle and end of the first text, then of the second, the third.
FACTS = {
    "short": [
        (None, "Who opened the Museum of Weather in Port Allard?", ["Heller", "postman"]),
        (None, "Who gave the snowflake book to the museum?", ["dentist"]),
        (None, "On which day of the week is the museum closed?", ["Tuesday"]),
        (None, "How many crowns does the garden club have in its box?", ["412"]),
        (None, "What disease does Professor Adler believe the plum tree has?", ["honey fungus"]),
        (None, "Where does the summer outing of the garden club go?", ["Veldhoven", "moss garden"]),
        (None, "Who is the first mate of the Fulmar?", ["Signe", "Aas"]),
        (None, "What was the cause of the failure of the starboard winch?", ["herring", "bone"]),
        (None, "What is the colour of the lids of the jars with samples of the sea floor?", ["green"]),
    ],
    "middle": [
        (
            "The harbour master in those years was a Dane named Tobias Lindqvist, who kept bees on the roof of the customs house and "
            "gave a jar of honey to every captain who paid his dues in time.",
            "What was the name of the harbour master?",
            ["Lindqvist"],
        ),
        (
            "The lamp of the lighthouse at Kettle Point still burned whale oil then, and on calm nights the smell of it came down "
            "as far as the church.",
            "What did the lamp of the lighthouse at Kettle Point burn?",
            ["whale"],
        ),
        (
            "As for the boathouse, its spare key hung behind the portrait of the admiral's horse, where no thief had ever thought of "
            "looking for it.",
            "Where did the spare key of the boathouse hang?",
            ["portrait", "horse"],
        ),
        (
            "Doctor Harriet Osgood had her practice above the bakery in Plum Lane, so that her patients came down the stairs with "
            "a prescription in one hand and a warm loaf in the other.",
            "Where did Doctor Harriet Osgood have her practice?",
            ["bakery", "Plum Lane"],
        ),
        (
            "The mill at Dunford was sold that autumn for eleven hundred pounds to a widow from Leeds, who had never seen it and who "
            "never came.",
            "For how many pounds was the mill at Dunford sold?",
            ["eleven hundred", "1,100", "1100"],
        ),
        (
            "The ferry to Saltmarsh goes on Thursdays only, and not even then if the ferryman sees a hare on his way to the landing.",
            "On which day does the ferry to Saltmarsh go?",
            ["Thursday"],
        ),
        (
            "The horse that won the race at the Ashby fair was called Juniper, and the boy who rode her had never sat on a horse "
            "before that day.",
            "What was the name of the horse that won the race at the Ashby fair?",
            ["Juniper"],
        ),
        (
            "The bridge at Corran was built by Matilda Fenwick, the first engineer of the county who signed her drawings with "
            "her own name.",
            "Who built the bridge at Corran?",
            ["Fenwick"],
        ),
        (
            "The librarian's cat slept in the drawer of the maps and was called Ptolemy; it was said to have eaten the coast of Norway.",
            "What was the librarian's cat called?",
            ["Ptolemy"],
        ),
    ],
    "long": [
        (
            "The observatory on Garrick Hill was founded by two sisters, Edith and Rosamund Vane, who had sold their carriage to pay "
            "for the lens.",
            "Who founded the observatory on Garrick Hill?",
            ["Vane", "Edith", "Rosamund"],
        ),
        (
            "The violin maker of Hollin Street used nothing but the wood of old church doors, since it had listened to music for two "
            "hundred years.",
            "What wood did the violin maker of Hollin Street use?",
            ["church door"],
        ),
        (
            "The parcel for Mr Quill was left at the Blue Anchor, under the bench by the stove, and nobody ever called for it.",
            "Where was the parcel for Mr Quill left?",
            ["Blue Anchor"],
        ),
        (
            "The smugglers of Black Cove had a password, and the password was marzipan, because no officer of the customs could say "
            "it without laughing.",
            "What was the password of the smugglers of Black Cove?",
            ["marzipan"],
        ),
        (
            "The bishop's clock at Wexley had stopped at twenty past four on the day of the flood, and was never wound again.",
            "At what time had the bishop's clock at Wexley stopped?",
            ["twenty past four", "4:20"],
        ),
        (
            "The gardener at Thornby planted nothing but blue hydrangeas, for he had been told that bees dream of them.",
            "What did the gardener at Thornby plant?",
            ["hydrangea"],
        ),
        (
            "The balloon of Monsieur Lacroix came down in a field of turnips near Ripley, and the farmer asked four shillings for the "
            "damage.",
            "Where did the balloon of Monsieur Lacroix come down?",
            ["turnip", "Ripley"],
        ),
        (
            "The painter Isabel Crane was paid for her fresco in cheese, forty wheels of it, which she shared with her apprentices.",
            "What was the painter Isabel Crane paid in for her fresco?",
            ["cheese"],
        ),
        (
            "When the wreck of the Marigold was raised at last, her treasure proved to be forty barrels of cinnamon.",
            "What was the treasure of the Marigold?",
            ["cinnamon"],
        ),
    ],
}


def texts(length):
    """Names and texts of one length, in the order in which they are asked."""
    if length == "short":
        return {f"{name}.txt": (HERE / f"{name}.txt").read_text() for name in ["museum", "garden", "ship"]}
    characters, begin = LENGTHS[length]
    novel = NOVEL.read_text()
    made = {}
    for number in range(3):
        piece = novel[begin + number * characters : begin + (number + 1) * characters]
        paragraphs = piece.split("\n\n")[1:-1]
        facts = [fact for fact, _, _ in FACTS[length][3 * number : 3 * number + 3]]
        # Behind the first paragraph, in the middle, before the last.
        for at, fact in reversed(list(zip([1, len(paragraphs) // 2, len(paragraphs) - 1], facts))):
            paragraphs.insert(at, fact)
        made[f"{length}-{number + 1}.txt"] = "\n\n".join(paragraphs) + "\n"
    return made


def main(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for length, facts in FACTS.items():
        documents = texts(length)
        for name, text in documents.items():
            (folder / name).write_text(text)
        names = list(documents)
        asked = [(names, number) for number in range(9)] + [([names[1]], 4)]
        for names, number in asked:
            _, question, answers = facts[number]
            cases.append({"documents": names, "question": question, "answers": answers, "group": length})
    (folder / "questions.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
