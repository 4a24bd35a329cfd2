#!/usr/bin/env python3
"""Writes a corpus of 1,000 notes of one paragraph each: `notes.py FOLDER`, then `landmarkdb eval questions FOLDER/questions.json`.

980 notes are paragraphs of Persuasion, 20 are ours, at even distances; one question about each of those is asked of all 1,000.
"""

import json
import sys
from pathlib import Path

NOVEL = Path(__file__).parent.parent / "persuasion.txt"
NOTES = 1000

# (note, question, what a right answer holds)
FACTS = [
    ("The combination of the bicycle shed is 7714. Turn the last wheel slowly, it sticks in the cold.",
     "What is the combination of the bicycle shed?", ["7714"]),
    ("Aunt Rosa's lemon cake: six eggs, the peel of four lemons, and a spoon of buckwheat honey. Bake it for fifty minutes.",
     "What kind of honey goes into Aunt Rosa's lemon cake?", ["buckwheat"]),
    ("The dentist moved. Doctor Varga is now in Salt Street 19, second floor, next to the piano shop.",
     "Where is the dentist Doctor Varga now?", ["Salt Street", "piano"]),
    ("Passport of Emil expires on the third of March 2031. The photo has to be taken without glasses.",
     "When does the passport of Emil expire?", ["March"]),
    ("The boiler man is called Mr Tadic and comes on the first Monday of the month. He likes his coffee black.",
     "What is the boiler man called?", ["Tadic"]),
    ("Boarding kennel for the dog: Birchwood Farm, ask for Agneta. She takes no poodles.",
     "What is the name of the boarding kennel for the dog?", ["Birchwood"]),
    ("The piano was tuned in October and cost ninety-five euros. The tuner says that the felt of the low A is worn.",
     "How much did tuning the piano cost?", ["ninety-five", "95"]),
    ("Book club in May reads The Leopard; Henrietta brings the olives. Bring back the two chairs.",
     "Which book does the book club read in May?", ["Leopard"]),
    ("The neighbour's tortoise is called Archimedes and may eat dandelions but no lettuce.",
     "What is the neighbour's tortoise called?", ["Archimedes"]),
    ("Paint of the front door: Pigeon Grey, number 4031, half a tin is left in the cellar behind the skis.",
     "What colour is the paint of the front door?", ["Pigeon", "Grey", "4031"]),
    ("The wifi of the holiday house is named Seagull and its password is threebluegates. It does not reach the garden.",
     "What is the wifi password of the holiday house?", ["threebluegates"]),
    ("Grandfather was born in Chernivtsi, not in Lviv as the family tree says. The certificate is in the blue folder.",
     "Where was grandfather born?", ["Chernivtsi"]),
    ("The best mushrooms grow behind the chapel at Rauhenstein, after three days of rain, on the side of the beeches.",
     "Where do the best mushrooms grow?", ["Rauhenstein", "chapel"]),
    ("Insurance of the car: policy 88-1203 with Northern Mutual. The man to call is Mr Ferrante.",
     "With which company is the car insured?", ["Northern Mutual", "Northern"]),
    ("Clara is allergic to hazelnuts. Almonds are fine. The pen is in the drawer of the hall.",
     "What is Clara allergic to?", ["hazelnut"]),
    ("The choir sings in the old tannery on the twelfth of December. Black clothes, red scarf.",
     "Where does the choir sing in December?", ["tannery"]),
    ("The cat's medicine is half a tablet of Felimox with tuna, every other evening.",
     "How much Felimox does the cat get?", ["half"]),
    ("The spare tent pegs are in the cello case in the attic, because nobody looks there.",
     "Where are the spare tent pegs?", ["cello"]),
    ("Train to Uncle Wenzel: change at Brunnfeld and take the bus 46 to the last stop. He fetches us with the tractor.",
     "Where does one change trains on the way to Uncle Wenzel?", ["Brunnfeld"]),
    ("The plumber found a child's marble in the pipe of the washing machine; his bill is paid.",
     "What did the plumber find in the pipe of the washing machine?", ["marble"]),
]


def main(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [p.strip() for p in NOVEL.read_text().split("\n\n")]
    notes = [p for p in paragraphs if 60 <= len(p) <= 900][: NOTES - len(FACTS)]
    if len(notes) < NOTES - len(FACTS):
        # Long paragraphs give two notes and more.
        longer = [p for p in paragraphs if len(p) > 900]
        halves = [half for p in longer for half in (p[: p.find(". ", 300) + 1], p[p.find(". ", 300) + 2 :][:900])]
        notes += [half for half in halves if len(half) >= 60][: NOTES - len(FACTS) - len(notes)]
    for number, (note, _, _) in enumerate(FACTS):
        notes.insert(20 + number * NOTES // len(FACTS), note)
    names = [f"note-{number:04}.txt" for number in range(len(notes))]
    for name, note in zip(names, notes):
        (folder / name).write_text(note + "\n")
    cases = [{"documents": names, "question": question, "answers": answers} for _, question, answers in FACTS]
    (folder / "questions.json").write_text(json.dumps(cases) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
