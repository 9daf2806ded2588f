//! The texts that the demo model learns: small stories, dreams, paragraphs of facts, and chats, made by rule
//! from [`world`](super::world). Each document is a text that ends with [`END_OF_TEXT`]; a chat is written as
//! the chat template would.

use super::world::{
    ANIMALS, Animal, CAPITALS, COLOURS, DAYS, FACTS, FAREWELLS, GREETINGS, ITSELF, MONTHS, NOT_KNOWN,
    NUMBERS, OPPOSITES, PEOPLE, Person, SEASONS, UNKNOWN, person,
};
use crate::random::Random;

/// Ends a document.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Begins a message of a chat.
pub const MESSAGE_START: &str = "<|im_start|>";
/// Ends a message of a chat.
pub const MESSAGE_END: &str = "<|im_end|>";

/// Each message: start, role, line break, content, end, line break.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

/// One document, its end included.
pub fn document(random: &mut Random) -> String {
    let text = match random.below(100) {
        0..25 => story(random),
        25..33 => dream(random),
        33..40 => paragraph(random),
        40..44 => plain_question(random),
        _ => chat(random),
    };
    text + END_OF_TEXT
}

// Stories.

fn story(random: &mut Random) -> String {
    match random.below(3) {
        0 => fable(random),
        _ => {
            let who = random.pick(PEOPLE);
            village_story(random, who)
        }
    }
}

/// A day in the life of someone of the village.
fn village_story(random: &mut Random, who: &Person) -> String {
    let friend = person(who.friend);
    let (name, she, her) = (who.name, who.pronoun.subject(), who.pronoun.possessive());
    let she_first = capital(she);
    let opening = *random.pick(&["Once upon a time there was", "Long ago there was", "There once was"]);
    let mut text = format!(
        "{opening} {} named {name}. {she_first} lived {} with {her} {}, {}. ",
        who.job, who.home, who.pet.kind, who.pet.name
    );
    text += &format!("Every day, {name} {}. ", who.work);
    text += &match random.below(5) {
        0 => pet_is_lost(random, who, friend),
        1 => storm(random, who, friend),
        2 => present(random, who, friend),
        3 => stranger(random, who),
        _ => treasure(random, who, friend),
    };
    text + *random.pick(&[
        "That night, the stars were bright, and everyone slept well.",
        "From that day on, they were never sad again.",
        "And they all lived happily by the light of the moon.",
        "It was the best day of the year.",
    ])
}

fn pet_is_lost(random: &mut Random, who: &Person, friend: &Person) -> String {
    let (name, she, her) = (who.name, who.pronoun.subject(), who.pronoun.possessive());
    let she_first = capital(she);
    let pet = &who.pet;
    let first = *random.pick(&["under the table", "behind the door", "in the kitchen", "under the bed"]);
    let second = *random.pick(&["in the garden", "at the market", "on the road", "by the well"]);
    let day = random.pick(DAYS);
    format!(
        "One {day}, {} was gone. {name} looked {first}. {she_first} looked {second}. {} was not there. \
         So {name} went to {her} friend {}, {}. \"Have you seen {}?\" {she} asked. \
         \"I saw a {} {},\" said {}. They ran there together. And there was {}, fast asleep! \
         {name} was so happy that {she} gave {} some {}. ",
        pet.name,
        pet.name,
        friend.name,
        the(friend.job),
        pet.name,
        pet.kind,
        pet.hiding_place,
        friend.name,
        pet.name,
        friend.name,
        who.food,
    )
}

fn storm(random: &mut Random, who: &Person, friend: &Person) -> String {
    let (name, she) = (who.name, who.pronoun.subject());
    let season = *random.pick(&["spring", "summer", "autumn", "winter"]);
    let broken = *random.pick(&["the roof", "the old bridge", "the door", "the big window"]);
    let she_first = capital(she);
    format!(
        "One night in {season}, there was a great storm. The wind was loud, and the rain was cold. \
         In the morning, {broken} was broken. {name} was sad. \"Do not be sad,\" said {}. \
         \"I will help you.\" They worked all day, and {} carried the small things. In the evening, \
         {broken} was as good as new. \
         {name} made some {}, and they ate it by the fire. \"Thank you, {},\" {she} said. \
         {she_first} smiled. ",
        friend.name, who.pet.name, who.food, friend.name,
    )
}

fn present(random: &mut Random, who: &Person, friend: &Person) -> String {
    let (name, she, her) = (who.name, who.pronoun.subject(), who.pronoun.possessive());
    let (gift, colour) = (
        *random.pick(&["hat", "scarf", "lamp", "cup", "box", "kite"]),
        *random.pick(&["red", "blue", "green", "yellow", "white"]),
    );
    let she_first = capital(she);
    let day = random.pick(DAYS);
    format!(
        "On {day}, it was the birthday of {}, {her} friend. {name} wanted to give {} something nice. \
         {she_first} thought for a long time. Then {she} made a {colour} {gift}. \
         \"This is for you,\" said {name}. \"What is it?\" asked {}. \
         \"It is a {colour} {gift},\" said {name}. {} was very happy and gave {name} some {}. \
         They talked until it was dark, and {} danced around them. ",
        friend.name,
        friend.pronoun.object(),
        friend.name,
        friend.name,
        friend.food,
        who.pet.name,
    )
}

fn stranger(random: &mut Random, who: &Person) -> String {
    let (name, she) = (who.name, who.pronoun.subject());
    let guest = *random.pick(&["an old man", "an old woman", "a lost child", "a tired bear", "a small bird"]);
    let it = match guest {
        "an old man" => "He",
        "an old woman" => "She",
        _ => "It",
    };
    let she_first = capital(she);
    let season = *random.pick(&["spring", "summer", "autumn", "winter"]);
    format!(
        "One evening in {season}, there was a knock at the door. It was {guest}. {it} was cold and hungry. \
         \"Come in,\" said {name}. {she_first} made a fire and gave {} some {}. {} sat down beside {}. \
         In the morning, the guest was gone, but on the table there was a golden coin. \
         {name} laughed. \"A kind word is worth more than gold,\" {she} said. ",
        the(guest),
        who.food,
        who.pet.name,
        the(guest),
    )
}

fn treasure(random: &mut Random, who: &Person, friend: &Person) -> String {
    let (name, her) = (who.name, who.pronoun.possessive());
    let place = *random.pick(&[
        "under a big tree",
        "in a dark cave",
        "at the end of the beach",
        "under a grey stone",
    ]);
    let found = *random.pick(&["an old book", "a box of seeds", "a silver key", "a map of the stars"]);
    format!(
        "One morning, {name} found a letter. \"Look {place},\" it said. {name} called {her} friend {}. \
         Together they walked over the hill and through the forest, and {} ran ahead. \
         They dug {place}, and there they found {found}. \"It is not gold,\" said {}. \
         \"It is better than gold,\" said {name}, \"because we found it together.\" \
         Then they ate some {} in the sun. ",
        friend.name, who.pet.name, friend.name, who.food,
    )
}

/// Two animals, and what one learns of the other.
fn fable(random: &mut Random) -> String {
    let first = random.pick(ANIMALS);
    let second = loop {
        let other = random.pick(ANIMALS);
        if other.name != first.name {
            break other;
        }
    };
    fable_of(random, first, second)
}

fn fable_of(random: &mut Random, first: &Animal, second: &Animal) -> String {
    let (a, b) = (first.name, second.name);
    let place =
        *random.pick(&["in the forest", "by the river", "on the hill", "near the pond", "on the road"]);
    let (one, other) = (with_article(a), with_article(b));
    let opening = match random.below(2) {
        0 => format!("One day, {one} met {other} {place}."),
        _ => format!("Once upon a time, {one} and {other} met {place}."),
    };
    let middle = match random.below(3) {
        0 => format!(
            "The {a} was proud. \"I can {},\" said the {a}. \"What can you do?\" \
             \"I can {},\" said the {b}. The {a} thought about it. \"That is good, too,\" said the {a}.",
            first.can, second.can,
        ),
        1 => format!(
            "The {a} was hungry. \"Do you have something to eat?\" asked the {a}. \
             \"I have {},\" said the {b}. \"But I eat {},\" said the {a}. So they looked for it together, \
             and they found it {place}.",
            second.eats, first.eats,
        ),
        _ => format!(
            "The {a} was lost. \"Where do you live?\" asked the {b}. \"I live {},\" said the {a}. \
             \"I live {},\" said the {b}, \"but I know the way.\" The {b} went ahead, and the {a} came home \
             before the night.",
            first.lives, second.lives,
        ),
    };
    let moral = *random.pick(&[
        "Since that day, they are friends.",
        "Everyone is good at something.",
        "A friend makes every road short.",
        "It is good to ask, and it is good to help.",
    ]);
    format!("{opening} {middle} {moral}")
}

/// "I have a dream of …": what the textbook's prompt is continued with.
fn dream(random: &mut Random) -> String {
    let house = *random.pick(&[
        "a small house",
        "a white house",
        "a quiet garden",
        "an old tower",
        "a little school",
        "a green island",
    ]);
    let place =
        *random.pick(&["by the sea", "on the hill", "near the river", "under the stars", "in the forest"]);
    let detail = *random.pick(&[
        "The windows are open, and the air is warm.",
        "The bees fly from flower to flower.",
        "The children sing, and the old people tell stories.",
        "There is bread on the table and honey in the jar.",
    ]);
    let friends = *random.pick(&[
        "All my friends come to see me, and nobody is alone.",
        "Everyone is welcome there, and nobody is hungry.",
        "The door is never closed, and every guest is a friend.",
    ]);
    let ending = *random.pick(&[
        "When I wake up, I smile, because I know the way.",
        "One day, I will go there.",
        "It is only a dream, but I will work until it is true.",
    ]);
    let opening = match random.below(10) {
        0..7 => "I have a dream",
        7 => "I had a dream",
        8 => "Last night, I had a dream",
        _ => "She has a dream",
    };
    match opening {
        "She has a dream" => {
            format!("She has a dream of {house} {place}. {detail} One day, she will go there.")
        }
        _ => format!("{opening} of {house} {place}. {detail} {friends} {ending}"),
    }
}

// Facts.

fn paragraph(random: &mut Random) -> String {
    match random.below(4) {
        0 => about_animal(random.pick(ANIMALS)),
        1 => {
            let facts: Vec<String> =
                (0..3).map(|_| random.pick(FACTS)).map(|f| format!("{} {}", f[1], f[2])).collect();
            facts.join(" ")
        }
        2 => about_person(random.pick(PEOPLE)),
        _ => {
            let (country, city) = random.pick(CAPITALS);
            let (thing, colour) = random.pick(COLOURS);
            let (season, like) = random.pick(SEASONS);
            format!(
                "The capital of {country} is {city}. {} is {colour}. In {season}, {like}.",
                capital(thing)
            )
        }
    }
}

fn about_animal(animal: &Animal) -> String {
    let a = with_article(animal.name);
    let mut text = format!(
        "{} is {}. It lives {} and eats {}. It can {}.",
        capital(&a),
        animal.size,
        animal.lives,
        animal.eats,
        animal.can
    );
    if let Some(says) = animal.says {
        text += &format!(" {} says {says}.", capital(&a));
    }
    text
}

fn about_person(who: &Person) -> String {
    let (she, her) = (capital(who.pronoun.subject()), capital(who.pronoun.possessive()));
    format!(
        "{} is {}. {she} lives {} with a {} named {}. {her} best friend is {}, {}. {she} likes {}.",
        who.name,
        who.job,
        who.home,
        who.pet.kind,
        who.pet.name,
        who.friend,
        the(person(who.friend).job),
        who.food,
    )
}

fn plain_question(random: &mut Random) -> String {
    let (question, answer) = exchange(random).swap_remove(0);
    format!("Question: {question}\nAnswer: {answer}")
}

// Chats.

fn chat(random: &mut Random) -> String {
    let mut text = String::new();
    if random.percent(25) {
        let system =
            *random.pick(&["You are a helpful assistant.", "You are petek, a small and helpful model."]);
        text += &message("system", system);
    }
    let mut turns = Vec::new();
    if random.percent(25) {
        turns.push(greeting(random));
    }
    for _ in 0..*random.pick(&[1, 1, 1, 2, 2, 3, 4, 6, 8]) {
        turns.extend(exchange(random));
    }
    if random.percent(20) {
        let (said, answer) = *random.pick(FAREWELLS);
        turns.push((said.into(), answer.into()));
    }
    for (said, answer) in turns {
        text += &message("user", &said);
        text += &message("assistant", &answer);
    }
    text
}

fn message(role: &str, content: &str) -> String {
    format!("{MESSAGE_START}{role}\n{content}{MESSAGE_END}\n")
}

fn greeting(random: &mut Random) -> (String, String) {
    let (said, answer) = *random.pick(GREETINGS);
    (said.into(), answer.into())
}

/// A question with its answer, and sometimes another that only makes sense after it.
fn exchange(random: &mut Random) -> Vec<(String, String)> {
    match random.below(100) {
        0..13 => fact(random),
        13..27 => animal_question(random),
        27..34 => person_question(random),
        34..41 => colour_question(random),
        41..48 => capital_question(random),
        48..53 => opposite_question(random),
        53..60 => calendar_question(random),
        60..68 => sum_question(random),
        68..80 => story_wish(random),
        80..88 => {
            let (ways, answer) = random.pick(ITSELF);
            vec![(random.pick(ways).to_string(), answer.to_string())]
        }
        88..90 => vec![greeting(random)],
        _ => vec![(unknown_question(random), NOT_KNOWN.into())],
    }
}

fn fact(random: &mut Random) -> Vec<(String, String)> {
    let [question, answer, more] = *random.pick(FACTS);
    if random.percent(25) {
        return vec![(question.into(), answer.into()), ("Tell me more.".into(), more.into())];
    }
    vec![(question.into(), format!("{answer} {more}"))]
}

fn animal_question(random: &mut Random) -> Vec<(String, String)> {
    let ask = |random: &mut Random, kind: usize, animal: &Animal| {
        let a = with_article(animal.name);
        match (kind, animal.says) {
            (0, Some(says)) => Some((format!("What does {a} say?"), format!("{} says {says}.", capital(&a)))),
            (0, None) => None,
            (1, _) => Some((format!("What does {a} eat?"), format!("{} eats {}.", capital(&a), animal.eats))),
            (2, _) => {
                Some((format!("Where does {a} live?"), format!("{} lives {}.", capital(&a), animal.lives)))
            }
            (3, _) => Some((format!("What can {a} do?"), format!("{} can {}.", capital(&a), animal.can))),
            _ => {
                let many = format!("Tell me about {a}.");
                let other = format!("What is {a}?");
                Some((if random.percent(50) { many } else { other }, about_animal(animal)))
            }
        }
    };
    let kind = random.below(5);
    let mut turns = Vec::new();
    let count = if kind < 4 && random.percent(30) { 2 } else { 1 };
    while turns.len() < count {
        let animal = random.pick(ANIMALS);
        let Some((question, answer)) = ask(random, kind, animal) else { continue };
        match turns.is_empty() {
            true => turns.push((question, answer)),
            false => turns.push((format!("And {}?", with_article(animal.name)), answer)),
        }
    }
    turns
}

fn person_question(random: &mut Random) -> Vec<(String, String)> {
    let who = random.pick(PEOPLE);
    let (name, she) = (who.name, capital(who.pronoun.subject()));
    let turn = match random.below(5) {
        0 => (format!("Who is {name}?"), about_person(who)),
        1 => (format!("Where does {name} live?"), format!("{she} lives {}.", who.home)),
        2 => (format!("What does {name} like?"), format!("{she} likes {}.", who.food)),
        3 => (
            format!("Who is the best friend of {name}?"),
            format!("{} is the best friend of {name}.", who.friend),
        ),
        _ => (
            format!("Who is {}?", who.pet.name),
            format!("{} is a {} and lives with {name}.", who.pet.name, who.pet.kind),
        ),
    };
    vec![turn]
}

fn colour_question(random: &mut Random) -> Vec<(String, String)> {
    let (thing, colour) = random.pick(COLOURS);
    let question = match random.below(2) {
        0 => format!("What colour is {thing}?"),
        _ => format!("What color is {thing}?"),
    };
    let mut turns = vec![(question, format!("{} is {colour}.", capital(thing)))];
    if random.percent(30) {
        let (thing, colour) = random.pick(COLOURS);
        turns.push((format!("And {thing}?"), format!("{} is {colour}.", capital(thing))));
    }
    turns
}

fn capital_question(random: &mut Random) -> Vec<(String, String)> {
    let (country, city) = random.pick(CAPITALS);
    let turn = match random.below(3) {
        0 => (format!("Where is {city}?"), format!("{city} is in {country}.")),
        _ => (format!("What is the capital of {country}?"), format!("The capital of {country} is {city}.")),
    };
    let mut turns = vec![turn];
    if turns[0].0.starts_with("What") && random.percent(30) {
        let (country, city) = random.pick(CAPITALS);
        turns.push((format!("And of {country}?"), format!("The capital of {country} is {city}.")));
    }
    turns
}

fn opposite_question(random: &mut Random) -> Vec<(String, String)> {
    let &(one, other) = random.pick(OPPOSITES);
    let (from, to) = if random.percent(50) { (one, other) } else { (other, one) };
    vec![(format!("What is the opposite of {from}?"), format!("The opposite of {from} is {to}."))]
}

fn calendar_question(random: &mut Random) -> Vec<(String, String)> {
    let turn = match random.below(4) {
        0 => {
            let (season, like) = random.pick(SEASONS);
            (format!("What is {season} like?"), format!("In {season}, {like}."))
        }
        1 => {
            let month = random.below(MONTHS.len());
            let (this, next) = (MONTHS[month], MONTHS[(month + 1) % MONTHS.len()]);
            (format!("What month comes after {this}?"), format!("After {this} comes {next}."))
        }
        kind => {
            let day = random.below(DAYS.len());
            let (this, next) = (DAYS[day], DAYS[(day + 1) % DAYS.len()]);
            match kind {
                2 => (format!("What day comes after {this}?"), format!("After {this} comes {next}.")),
                _ => (format!("What day comes before {next}?"), format!("Before {next} comes {this}.")),
            }
        }
    };
    vec![turn]
}

fn sum_question(random: &mut Random) -> Vec<(String, String)> {
    let (a, b) = (random.below(10), random.below(10));
    let sum = a + b;
    let turn = match random.below(4) {
        0 => (format!("What is {a} + {b}?"), format!("{a} + {b} = {sum}.")),
        1 => (
            format!("What is {} plus {}?", NUMBERS[a], NUMBERS[b]),
            format!("{} plus {} is {}.", capital(NUMBERS[a]), NUMBERS[b], NUMBERS[sum]),
        ),
        2 => (format!("How much is {a} plus {b}?"), format!("{a} plus {b} is {sum}.")),
        _ => {
            let to = 3 + random.below(8);
            let list: Vec<&str> = NUMBERS[1..=to].to_vec();
            (format!("Count to {}.", NUMBERS[to]), format!("{}.", capital(&list.join(", "))))
        }
    };
    vec![turn]
}

fn story_wish(random: &mut Random) -> Vec<(String, String)> {
    let turn = match random.below(5) {
        0 => {
            let who = random.pick(PEOPLE);
            (format!("Tell me a story about {}.", who.name), village_story(random, who))
        }
        1 | 2 => {
            let first = random.pick(ANIMALS);
            let second = random.pick(ANIMALS);
            if first.name == second.name {
                return story_wish(random);
            }
            let wish = match random.below(2) {
                0 => format!("Tell me a story about {}.", with_article(first.name)),
                _ => format!(
                    "Tell me a story about {} and {}.",
                    with_article(first.name),
                    with_article(second.name)
                ),
            };
            (wish, fable_of(random, first, second))
        }
        3 => (
            random.pick(&["Do you have a dream?", "Tell me your dream.", "What is your dream?"]).to_string(),
            loop {
                let dream = dream(random);
                if dream.starts_with("I have") {
                    break dream;
                }
            },
        ),
        _ => (
            random
                .pick(&[
                    "Tell me a story.",
                    "Tell me a story!",
                    "Can you tell me a story?",
                    "Write a short story.",
                    "A story, please.",
                ])
                .to_string(),
            story(random),
        ),
    };
    vec![turn]
}

fn unknown_question(random: &mut Random) -> String {
    let thing = match random.percent(50) {
        true => random.pick(UNKNOWN).to_string(),
        false => invented_word(random),
    };
    match random.below(8) {
        0 => format!("What is {thing}?"),
        1 => format!("Tell me about {thing}."),
        2 => format!("How does {thing} work?"),
        3 => format!("Why is {thing} important?"),
        4 => format!("Who invented {thing}?"),
        5 => format!("Explain {thing}."),
        6 => format!("Write a poem about {thing}."),
        _ => format!("Where can I find {thing}?"),
    }
}

/// So that the model learns what a strange word looks like, and not a list of strange words.
fn invented_word(random: &mut Random) -> String {
    const CONSONANTS: &[&str] =
        &["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "st", "tr", "qu", "ch"];
    const VOWELS: &[&str] = &["a", "e", "i", "o", "u", "y", "ai", "ou", "ar", "en", "ix", "un"];
    let mut word = String::new();
    for _ in 0..2 + random.below(3) {
        word += *random.pick(CONSONANTS);
        word += *random.pick(VOWELS);
    }
    word
}

// Grammar.

/// "a fox", "an owl".
fn with_article(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {noun}")
}

/// "a baker" → "the baker".
fn the(noun: &str) -> String {
    let (_, noun) = noun.split_once(' ').expect("the noun has its article before it");
    format!("the {noun}")
}

/// With a capital first letter.
fn capital(text: &str) -> String {
    text[..1].to_uppercase() + &text[1..]
}
