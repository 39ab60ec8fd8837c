"""Makes the demo's task: a booking said in plain words, and the strict JSON record that it means.

    python recipes/demo/make_data.py            writes train.jsonl and heldout.jsonl next to this file, byte for byte

Held-out rows use names that training never sees, and half of them phrasings that it never sees.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SYSTEM = "Turn the booking into JSON."
TRAIN_ROWS, HELDOUT_ROWS = 1200, 96

FIRST = """Aaron Ada Adam Adrian Agnes Aisha Alan Albert Alice Alma Amina Amir Ana Andre Angela Anika Anton
Arthur Astrid Aurora Beatrice Ben Bertha Boris Brenda Brian Camila Carl Carmen Cedric Chen Chloe Clara Colin
Conrad Cyrus Daniel Daria David Delia Derek Diana Diego Dimitri Edith Eduard Elena Elias Elsa Emil Emma Enzo
Eric Esther Eva Fabian Fatima Felix Fiona Frank Freya Gabriel George Gita Gloria Grace Gregor Greta Hana
Hannah Harold Hassan Hector Hilda Hiro Hugo Ida Ilse Ines Irene Isaac Isabel Ivan Jack Jacob James Jana Joan
Joel Jonas Jorge Judith Julia Julian Karim Kate Kenji Kevin Kira Klaus Laila Lars Laura Leo Leon Lewis Linda
Linus Liv Lucia Luis Lukas Lydia Mabel Magnus Malik Manuel Marco Maria Marta Martin Mateo Maya Mia Mikael Mira
Mona Nadia Naomi Natalie Nathan Nicolas Nils Nina Noah Noor Oleg Olga Oliver Omar Oscar Pablo Patrick Paul
Pedro Petra Philip Quentin Rachel Rafael Rania Ravi Rebecca Renata Richard Robin Roman Rosa Rosalind Rupert
Ruth Sabine Salma Samir Samuel Sandra Sara Sergio Simon Sofia Stefan Sven Sylvia Tamara Tara Teresa Theo
Thomas Tina Tobias Tom Ulrich Ursula Valentin Vera Victor Viola Walter Wanda Wei Werner William Xavier Yara
Yolanda Yuki Yusuf Zara Zoe""".split()
LAST = """Abbas Adler Ahmed Almeida Anders Arnold Bailey Baker Barros Bauer Beck Becker Benson Berg Bianchi
Blanc Bloom Bosch Brandt Brooks Brown Burns Castro Chandra Cohen Cole Conti Cook Costa Cruz Dahl Dale Davies
Dias Diaz Dixon Dubois Duran Eklund Ellis Evans Farah Fischer Flores Foster Fox Franke Frost Fuchs Garcia
Gibson Gomez Gray Green Gupta Haas Haddad Hall Hartmann Hayes Heller Hill Hoffmann Holm Howard Hughes Hunt Ito
Ivanov Jansen Jensen Joshi Kato Kaya Kelly Khan Kim King Klein Koch Kowalski Kramer Krause Lane Larsen Laurent
Lee Lehmann Lopez Lund Marino Marsh Martin Medina Meyer Mills Mohan Moreau Morgan Morris Murphy Nakamura Nash
Nguyen Novak Nunez Okafor Ortiz Osman Palmer Park Parker Patel Pavlov Perez Perry Petrov Pohl Popov Porter
Quinn Ramos Rao Reed Reyes Rivera Rossi Roth Ruiz Ryan Sanders Santos Sato Schmidt Schulz Shah Silva Singh
Smith Sokolov Stein Stone Suzuki Tanaka Tate Taylor Torres Turner Vargas Vogel Wagner Walker Ward Weber Wells
West White Winter Wolf Wong Wood Yamada Young Zhang Zimmer""".split()
HELDOUT_FIRST = "Abel Bruno Celia Dora Edgar Flora Gustav Helen Igor Jasmine Kurt Lena Milo Nora Otto Priya".split()
HELDOUT_LAST = "Bell Carter Doyle Engel Ferrari Grant Hansen Ibrahim Jones Keller Lindgren Mora Nilsson Olsen".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "two three four five six seven eight nine ten".split()
HOURS = "twelve one two three four five six seven eight nine ten".split()
SEATS = {
    "any": ["", ""],
    "inside": [" inside", " indoors", " in the dining room"],
    "outside": [" outside", " outdoors", " on the terrace", " in the garden"],
}

TRAIN_TEMPLATES = """A table{seat} for {guests} on {day} at {time}, please. The name is {name}.
Table for {guests}{seat}, {day} {time}, {name}.
Hi, {name} here. We would like to come on {day} at {time}, {guests} of us{seat}.
This is {name}. Could you keep a table{seat} for {guests} on {day}, {time}?
{name} would like to book for {guests}{seat} on {day} at {time}.
Please reserve a table for {guests}{seat} under {name}, {day} at {time}.
I need a table on {day} at {time} for {guests}{seat}. Name: {name}.
We are {guests} and want to eat{seat} on {day} at {time}. I am {name}.
{day} at {time}, {guests} people{seat}, name of {name}.
Can {guests} of us sit{seat} on {day} at {time}? Put it under {name}.
{name}, {guests} people, {day}, {time}{seat}.
Book {guests} seats{seat} for {name} at {time} on {day}.
Hello, a reservation for {name}: {guests} guests{seat}, {day} at {time}.
Is there room{seat} for {guests} on {day} at {time}? My name is {name}.
At {time} on {day} {name} is coming with a group of {guests}{seat}.
For {day}, a table{seat} at {time} for {guests}; it is for {name}.
My name is {name} and I want a table for {guests}{seat} on {day} at {time}.
{name} calling. {guests} of us on {day}, {time}{seat}.
Good morning, can I book{seat} for {guests} on {day} at {time}? It is {name}.
Good evening, {name} speaking, {day} at {time} for {guests}{seat}, please.
Please note: {name}, party of {guests}{seat}, {time} on {day}.
We plan to dine{seat} on {day} at {time}, {guests} persons, booked as {name}.
Could I get a table{seat} at {time} this {day}? We are {guests}. {name}.
Put {name} down for {guests}{seat} on {day} at {time}.
A booking of {guests}{seat} for {day}, {time}, and the name is {name}.
{guests} for dinner{seat} on {day} at {time}, under {name}.
I am {name}; we come on {day} at {time} and are {guests}{seat}.
Reserve{seat} for {guests}: {name}, {day}, {time}.
{name} asks for a table{seat} on {day}. There will be {guests} at {time}.
There are {guests} of us and we would sit{seat} at {time} on {day}. Thanks, {name}.
We will be {guests} on {day}. Around {time}{seat}? Signed {name}.
On {day} please hold a table for {guests}{seat} from {time}, for {name}.
Dear team, please book {guests} places{seat} at {time} on {day}. Regards, {name}.
I would love a table{seat} for {guests}, {day}, {time}. {name} is my name.
Do you have space for {guests}{seat} at {time} on {day}? It would be for {name}.
New booking: {day} {time}, {guests} guests{seat}, {name}.
Hey, it's {name}, can we do {day} at {time} for {guests}{seat}?
{name} wants {guests} places{seat}, {day} at {time}.
Save us a table{seat} on {day}: {guests} people, {time}, {name}.
Let us have a table at {time}{seat} on {day} for {guests}, under the name {name}.
It is {name} again, same as always: {guests}{seat}, {day}, {time}.
Dinner on {day} for {guests}{seat}, we arrive at {time}, ask for {name}.""".splitlines()

HELDOUT_TEMPLATES = """{name} needs somewhere to sit{seat} for {guests} people, {day}, at {time}.
We hope to visit on {day} around {time}; {guests} of us{seat}, and I go by {name}.
Would {day} work? {guests} people{seat}, {time}, thanks from {name}.
Kindly arrange seating{seat} for {guests} at {time} on {day} for {name}.
Mark {day} {time} for {name}, with {guests} in the party{seat}.
{time} on {day}{seat} for {guests}. You can call me {name}.
My family of {guests} would enjoy a meal{seat} on {day} at {time}. {name}.
Requesting a table: guests {guests}{seat}, when {day} {time}, who {name}.
If possible, seat {guests} of us{seat} at {time} on {day}. I'm {name}.
{name} and company, {guests} in all{seat}, come by on {day} at {time}.
Expect {guests} of us{seat} at {time} on {day}; ask for {name}.
Hello there! {guests} hungry people{seat}, {day} at {time}, booked by {name}.
The reservation is {name}'s: {day}, {time}, {guests} guests{seat}.
Any chance of a table{seat} for {guests}, {day}, {time}? I'm called {name}.""".splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chooser = random.Random(arguments.seed)
    train = [row(chooser, TRAIN_TEMPLATES, FIRST, LAST) for _ in range(TRAIN_ROWS)]
    heldout = [
        row(chooser, (TRAIN_TEMPLATES, HELDOUT_TEMPLATES)[number % 2], HELDOUT_FIRST, HELDOUT_LAST)
        for number in range(HELDOUT_ROWS)
    ]
    for name, rows in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.output / name).write_text(lines, encoding="utf-8", newline="\n")


def row(chooser: random.Random, templates: list[str], first: list[str], last: list[str]) -> dict[str, list]:
    """One conversation: the instruction, the booking in plain words, and its record."""
    name = f"{chooser.choice(first)} {chooser.choice(last)}"
    guests = chooser.randint(2, 10)
    day = chooser.choice(DAYS)
    hour, minute = chooser.randint(12, 22), chooser.choice([0, 0, 15, 30, 45])
    seating = chooser.choice(list(SEATS))
    sentence = chooser.choice(templates).format(
        name=name,
        guests=chooser.choice([str(guests), NUMBERS[guests - 2]]),
        day=day,
        time=spoken_time(chooser, hour, minute),
        seat=chooser.choice(SEATS[seating]),
    )
    record = {"name": name, "guests": guests, "day": day, "time": f"{hour}:{minute:02}", "seating": seating}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": sentence[0].upper() + sentence[1:]},
            {"role": "assistant", "content": json.dumps(record, separators=(",", ":"))},
        ]
    }


def spoken_time(chooser: random.Random, hour: int, minute: int) -> str:
    """An hour of the afternoon or evening as people write it."""
    twelve, word = (hour - 1) % 12 + 1, HOURS[hour - 12]
    forms = [f"{hour}:{minute:02}", f"{twelve}:{minute:02} pm"]
    if minute == 0:
        forms += [f"{twelve} pm", f"{word} o'clock"]
    elif minute == 30:
        forms += [f"half past {word}"]
    elif minute == 15:
        forms += [f"quarter past {word}"]
    elif hour < 22:
        forms += [f"quarter to {HOURS[hour - 11]}"]
    return chooser.choice(forms)


if __name__ == "__main__":
    main()
