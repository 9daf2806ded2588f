//! The little world of the demo model: who lives there, and what is true in it. Everything that the texts say
//! of it stands here once, so that they never contradict each other.

/// Someone that stories are about.
pub struct Person {
    /// First name.
    pub name: &'static str,
    /// "She" or "he".
    pub pronoun: Pronoun,
    /// With "a" or "an" before it.
    pub job: &'static str,
    /// What the person does every day, in the past tense.
    pub work: &'static str,
    /// Where the house is.
    pub home: &'static str,
    /// The animal of the house.
    pub pet: Pet,
    /// What the person gives to others and likes best.
    pub food: &'static str,
    /// Name of the best friend.
    pub friend: &'static str,
}

/// An animal of a house.
pub struct Pet {
    /// Its name.
    pub name: &'static str,
    /// Colour and kind: "grey cat".
    pub kind: &'static str,
    /// Where it hides, and where it is found.
    pub hiding_place: &'static str,
}

/// How a person is spoken of.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "the words themselves")]
pub enum Pronoun {
    She,
    He,
}

impl Pronoun {
    /// "she"
    pub fn subject(self) -> &'static str {
        match self {
            Self::She => "she",
            Self::He => "he",
        }
    }
    /// "her", before a noun
    pub fn possessive(self) -> &'static str {
        match self {
            Self::She => "her",
            Self::He => "his",
        }
    }
    /// "her", after a verb
    pub fn object(self) -> &'static str {
        match self {
            Self::She => "her",
            Self::He => "him",
        }
    }
}

macro_rules! people {
    ($($name:literal $pronoun:ident, $job:literal, $work:literal, $home:literal,
        ($pet:literal, $kind:literal, $hiding_place:literal), $food:literal, $friend:literal;)*) => {
        &[$(Person {
            name: $name, pronoun: Pronoun::$pronoun, job: $job, work: $work, home: $home,
            pet: Pet { name: $pet, kind: $kind, hiding_place: $hiding_place }, food: $food, friend: $friend,
        }),*]
    };
}

/// Everyone; friends are friends of each other.
pub const PEOPLE: &[Person] = people! {
    "Mia" She, "a baker", "baked bread for the village", "by the river",
        ("Pip", "grey cat", "behind the mill"), "warm bread", "Omar";
    "Omar" He, "a fisherman", "went out to sea in his blue boat", "by the sea",
        ("Salt", "white dog", "under the old boat"), "fish soup", "Mia";
    "Lena" She, "a beekeeper", "looked after the bees", "on the hill",
        ("Clover", "brown goat", "in the tall grass"), "golden honey", "Tom";
    "Tom" He, "a gardener", "watered the flowers", "near the old bridge",
        ("Moss", "green frog", "in the pond"), "sweet apples", "Lena";
    "Ada" She, "a clockmaker", "mended the clocks of the town", "next to the tower",
        ("Tick", "black mouse", "inside the big clock"), "plum cake", "Ben";
    "Ben" He, "a teacher", "taught the children to read", "beside the school",
        ("Ink", "black bird", "on top of the roof"), "nut pie", "Ada";
    "Rosa" She, "a doctor", "helped the people who were ill", "in the middle of the village",
        ("Button", "white rabbit", "in the cabbage field"), "carrot soup", "Emil";
    "Emil" He, "a shepherd", "led the sheep to the green hill", "under the mountain",
        ("Cloud", "small lamb", "behind the stone wall"), "fresh cheese", "Rosa";
    "Nora" She, "a painter", "painted the sea and the sky", "at the edge of the forest",
        ("Ruby", "red hen", "under the rose bush"), "berry jam", "Jon";
    "Jon" He, "a carpenter", "made chairs and tables", "behind the market",
        ("Bark", "brown dog", "in the barn"), "corn bread", "Nora";
};

/// The person of this name.
///
/// # Panics
/// Where nobody has it.
pub fn person(name: &str) -> &'static Person {
    PEOPLE.iter().find(|person| person.name == name).expect("everyone who is spoken of lives in the world")
}

/// An animal: name, what it says, what it eats, where it lives, what it can do.
pub struct Animal {
    /// With no article.
    pub name: &'static str,
    /// "meow"; nothing where it is silent.
    pub says: Option<&'static str>,
    /// "fish and milk"
    pub eats: &'static str,
    /// "in a house"
    pub lives: &'static str,
    /// "can see in the dark"
    pub can: &'static str,
    /// "small"
    pub size: &'static str,
}

macro_rules! animals {
    ($($name:literal $says:expr, $eats:literal, $lives:literal, $can:literal, $size:literal;)*) => {
        &[$(Animal { name: $name, says: $says, eats: $eats, lives: $lives, can: $can, size: $size }),*]
    };
}

/// What is known of animals.
pub const ANIMALS: &[Animal] = animals! {
    "cat" Some("meow"), "fish and mice", "in a house", "see in the dark", "small";
    "dog" Some("woof"), "meat and bones", "in a house", "guard the door", "friendly";
    "cow" Some("moo"), "grass", "on a farm", "give milk", "big";
    "sheep" Some("baa"), "grass", "on a green hill", "give wool", "soft";
    "duck" Some("quack"), "bread and weeds", "on a pond", "swim and fly", "small";
    "pig" Some("oink"), "corn and apples", "on a farm", "find roots in the ground", "round";
    "horse" Some("neigh"), "hay", "in a stable", "run very fast", "strong";
    "frog" Some("ribbit"), "flies", "in a pond", "jump very far", "small";
    "owl" Some("hoo"), "mice", "in an old tree", "fly without a sound", "wise";
    "bee" Some("buzz"), "nectar", "in a hive", "make honey", "small";
    "lion" Some("roar"), "meat", "in the dry grass", "run and climb", "strong";
    "fox" None, "mice and berries", "in the forest", "hear a mouse under the snow", "clever";
    "bear" None, "fish and honey", "in a cave", "sleep all winter", "big";
    "rabbit" None, "carrots and grass", "under the ground", "dig long tunnels", "quick";
    "elephant" None, "leaves and grass", "in a warm country", "carry a tree", "very big";
    "fish" None, "weeds", "in the water", "breathe under water", "silent";
    "ant" None, "seeds and leaves", "under the ground", "carry heavy things", "very small";
    "snail" None, "leaves", "in its shell", "climb up a wall", "slow";
};

/// Thing and colour, as in "the sky" is "blue".
pub const COLOURS: &[(&str, &str)] = &[
    ("the sky", "blue"),
    ("the sea", "blue"),
    ("the grass", "green"),
    ("a leaf", "green"),
    ("the sun", "yellow"),
    ("a lemon", "yellow"),
    ("snow", "white"),
    ("milk", "white"),
    ("coal", "black"),
    ("the night", "black"),
    ("a strawberry", "red"),
    ("blood", "red"),
    ("honey", "golden"),
    ("an orange", "orange"),
    ("chocolate", "brown"),
    ("an elephant", "grey"),
];

/// Country and capital.
pub const CAPITALS: &[(&str, &str)] = &[
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Spain", "Madrid"),
    ("Germany", "Berlin"),
    ("Turkey", "Ankara"),
    ("Greece", "Athens"),
    ("Japan", "Tokyo"),
    ("China", "Beijing"),
    ("England", "London"),
    ("Egypt", "Cairo"),
    ("Norway", "Oslo"),
    ("Portugal", "Lisbon"),
];

/// Words of opposite meaning.
pub const OPPOSITES: &[(&str, &str)] = &[
    ("hot", "cold"),
    ("big", "small"),
    ("day", "night"),
    ("up", "down"),
    ("fast", "slow"),
    ("old", "new"),
    ("happy", "sad"),
    ("open", "closed"),
    ("wet", "dry"),
    ("long", "short"),
    ("full", "empty"),
    ("loud", "quiet"),
    ("near", "far"),
    ("early", "late"),
];

/// In order.
pub const DAYS: &[&str] = &["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// In order.
pub const MONTHS: &[&str] = &[
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// From nought.
pub const NUMBERS: &[&str] = &[
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
];

/// Season and what it is like.
pub const SEASONS: &[(&str, &str)] = &[
    ("spring", "the flowers open and the birds come back"),
    ("summer", "the days are long and the sun is warm"),
    ("autumn", "the leaves turn red and fall from the trees"),
    ("winter", "the snow falls and the nights are long"),
];

/// Question, then the answer, then one more thing to say.
pub const FACTS: &[[&str; 3]] = &[
    [
        "What do bees make?",
        "Bees make honey.",
        "They gather nectar from the flowers and carry it to the hive.",
    ],
    [
        "What is a honeycomb?",
        "A honeycomb is the house of the bees.",
        "It is made of wax, and every cell has six sides.",
    ],
    [
        "How many sides does a cell of a honeycomb have?",
        "A cell of a honeycomb has six sides.",
        "So the cells fit together with no gaps.",
    ],
    [
        "Who leads the hive?",
        "The queen leads the hive.",
        "She lays all the eggs, and the other bees look after her.",
    ],
    [
        "How do bees find flowers?",
        "Bees see the colours of the flowers and smell them.",
        "When a bee finds a good place, she dances to tell the others.",
    ],
    [
        "Why is the sky blue?",
        "The sky is blue because the air scatters blue light the most.",
        "In the evening, it turns red.",
    ],
    ["What is the sun?", "The sun is a star.", "It gives us light and keeps us warm."],
    [
        "What is the moon?",
        "The moon goes around the earth.",
        "It shines at night because the sun shines on it.",
    ],
    [
        "What is rain?",
        "Rain is water that falls from the clouds.",
        "It fills the rivers and helps the plants to grow.",
    ],
    ["What is snow?", "Snow is frozen water.", "It falls in winter and makes the hills white."],
    ["What is ice?", "Ice is frozen water.", "When it gets warm, the ice melts."],
    ["Where do rivers go?", "Rivers go to the sea.", "They begin in the mountains as small streams."],
    ["What do plants need?", "Plants need water, light and good earth.", "Then they grow day by day."],
    [
        "What is bread made of?",
        "Bread is made of flour, water and salt.",
        "The baker bakes it in a hot oven.",
    ],
    ["What is butter made of?", "Butter is made of milk.", "You shake the cream until it is thick."],
    ["What is wine made of?", "Wine is made of grapes.", "The grapes are pressed in autumn."],
    ["What is a book?", "A book is many pages with words.", "You can read it again and again."],
    ["What is a clock for?", "A clock tells the time.", "It has two hands and twelve numbers."],
    ["How many legs does a spider have?", "A spider has eight legs.", "It spins a web to catch flies."],
    ["How many legs does an insect have?", "An insect has six legs.", "Bees and ants are insects."],
    [
        "How many days are in a week?",
        "There are seven days in a week.",
        "The first is Monday, and the last is Sunday.",
    ],
    [
        "How many months are in a year?",
        "There are twelve months in a year.",
        "The first is January, and the last is December.",
    ],
    [
        "How many hours are in a day?",
        "There are twenty-four hours in a day.",
        "Half of them are light, and half are dark.",
    ],
    [
        "What is a friend?",
        "A friend is someone who helps you.",
        "It is good to have one, and it is good to be one.",
    ],
    ["What is music?", "Music is sound that is made with care.", "People sing and dance to it."],
    [
        "What is a dream?",
        "A dream is a story that you see when you sleep.",
        "Some dreams are about the things you wish for.",
    ],
];

/// What the model says of itself: the ways to ask, then the answer.
pub const ITSELF: &[(&[&str], &str)] = &[
    (
        &["Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself."],
        "I am petek, a very small language model. I can tell stories and answer simple questions.",
    ),
    (
        &["What is your name?", "What's your name?", "Do you have a name?", "How are you called?"],
        "My name is petek. It means honeycomb in Turkish.",
    ),
    (
        &["What does petek mean?", "What is petek?", "What does your name mean?"],
        "Petek is the Turkish word for honeycomb.",
    ),
    (
        &["What can you do?", "Can you help me?", "How can you help me?", "What do you know?", "Help me."],
        "I can tell you a story, or answer a question about animals, colours, numbers, days or bees.",
    ),
    (
        &["How old are you?", "When were you born?", "Who made you?", "How were you made?"],
        "I was trained in less than an hour on a small computer, from stories that a program wrote.",
    ),
    (
        &["How are you?", "How are you today?", "How do you do?", "Are you well?"],
        "I am well, thank you. How can I help you?",
    ),
];

/// Greeting and answer.
pub const GREETINGS: &[(&str, &str)] = &[
    ("Hello", "Hello! How can I help you?"),
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Hi!", "Hello! How can I help you?"),
    ("Hi there!", "Hello! How can I help you?"),
    ("Hey", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Good evening!", "Good evening! How can I help you?"),
    ("Merhaba!", "Merhaba! How can I help you?"),
];

/// Thanks or farewell, and answer.
pub const FAREWELLS: &[(&str, &str)] = &[
    ("Thank you!", "You are welcome!"),
    ("Thank you.", "You are welcome!"),
    ("Thanks!", "You are welcome!"),
    ("Thanks a lot.", "You are welcome!"),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("Bye", "Goodbye! Come back soon."),
    ("Bye!", "Goodbye! Come back soon."),
    ("Good night!", "Good night! Sleep well."),
    ("That is nice.", "I am glad that you like it."),
    ("I like it.", "I am glad that you like it."),
    ("Good.", "I am glad that you like it."),
];

/// Things that the model has never heard of, as far as its answers go.
pub const UNKNOWN: &[&str] = &[
    "democracy",
    "inflation",
    "football",
    "Napoleon",
    "gravity",
    "quantum physics",
    "the stock market",
    "computer science",
    "electricity",
    "the internet",
    "Shakespeare",
    "philosophy",
    "chess",
    "a volcano",
    "the Roman empire",
    "a black hole",
    "chemistry",
    "the weather in London",
    "my tax",
    "politics",
    "a GPU",
    "distributed systems",
    "Rust",
    "Python",
    "a compiler",
    "the meaning of life",
    "Mars",
    "a dinosaur",
    "machine learning",
    "a transformer",
    "Kubernetes",
    "opera",
    "tennis",
    "algebra",
    "a virus",
    "history",
    "the president",
    "Einstein",
    "a bank",
    "coffee",
    "a train",
    "pizza",
    "New York",
    "the law",
    "jazz",
    "a robot",
    "energy",
    "an atom",
    "the economy",
    "marketing",
    "a recipe",
    "medicine",
    "space travel",
];

/// What is said of all those.
pub const NOT_KNOWN: &str = "I do not know that. I am a very small model. \
    Ask me about animals, colours, numbers or bees, or for a story.";
