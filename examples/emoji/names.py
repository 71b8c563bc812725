"""Which emoji the data set holds, and the plain English name each goes by.

Left out are those that are a part or a trace of an animal (pig nose, paw prints, nests), wear a
harness (guide dog), look like another one in the glossy set (ram and sheep), have a colour in their
name, no short everyday name, or a picture in one of the two sets only. The leopard goes by cheetah
and the chipmunk by squirrel: the sets have no nearer picture of those.
"""

_UNCHANGED = """
ant, avocado, bacon, badger, bagel, banana, bat, beans, beaver, beetle, bell pepper, bento box,
bird, birthday cake, bison, blueberries, boar, bouquet, bread, broccoli, bubble tea, burrito,
butter, butterfly, cactus, candy, carrot, cat, cherries, cherry blossom, chestnut, chicken,
chocolate bar, cockroach, cocktail glass, coconut, cookie, coral, cow, crab, cricket, crocodile,
croissant, cucumber, cupcake, custard, deer, dodo, dog, dolphin, donkey, doughnut, dove, dragon,
duck, dumpling, eagle, egg, elephant, feather, fish, flamingo, fly, fortune cookie, garlic, goat,
goose, gorilla, grapes, hamburger, hedgehog, hibiscus, hippopotamus, honey pot, horse, hot dog,
hyacinth, ice cream, ice cube, jar, jellyfish, kangaroo, koala, lemon, lizard, llama, lobster,
lollipop, lotus, mammoth, mango, maple leaf, melon, monkey, moose, mosquito, mouse, mushroom,
octopus, olive, onion, orangutan, otter, owl, ox, oyster, palm tree, pancakes, parrot, pea pod,
peach, peacock, peanuts, pear, penguin, pie, pig, pineapple, polar bear, poodle, popcorn, potato,
potted plant, pretzel, rabbit, raccoon, rat, rhinoceros, rooster, rose, salt shaker, sandwich,
scorpion, seal, seedling, shark, shaved ice, sheep, shrimp, skunk, sloth, snail, snake, spaghetti,
spider, spoon, squid, strawberry, sunflower, sushi, swan, taco, takeout box, tangerine, teapot,
tiger, tomato, tropical drink, tropical fish, tulip, turkey, turtle, waffle, water buffalo,
watermelon, whale, wine glass, worm
"""

_RENAMED = {
    "aubergine": "eggplant",
    "baby bottle": "bottle",
    "baby chick": "chick",
    "bactrian camel": "camel",
    "baguette bread": "baguette",
    "bear face": "bear",
    "beer mug": "beer",
    "beverage box": "juice box",
    "blossom": "flower",
    "blowfish": "pufferfish",
    "bottle with popping cork": "champagne",
    "bowl with spoon": "bowl",
    "bug": "caterpillar",
    "canned food": "can",
    "cat face": "cat",
    "cheese wedge": "cheese",
    "chipmunk": "squirrel",
    "cooked rice": "rice",
    "cooking": "fried egg",
    "cow face": "cow",
    "cup with straw": "soda",
    "curry and rice": "curry",
    "cut of meat": "steak",
    "deciduous tree": "tree",
    "dog face": "dog",
    "dragon face": "dragon",
    "dromedary camel": "camel",
    "ear of maize": "corn",
    "evergreen tree": "pine tree",
    "four leaf clover": "clover",
    "fox face": "fox",
    "french fries": "fries",
    "frog face": "frog",
    "front-facing baby chick": "chick",
    "ginger root": "ginger",
    "giraffe face": "giraffe",
    "glass of milk": "milk",
    "green salad": "salad",
    "hamster face": "hamster",
    "hocho": "knife",
    "honeybee": "bee",
    "horse face": "horse",
    "hot beverage": "coffee",
    "hot pepper": "pepper",
    "kiwifruit": "kiwi",
    "lady beetle": "ladybug",
    "leafy green": "lettuce",
    "leopard": "cheetah",
    "lion face": "lion",
    "monkey face": "monkey",
    "mouse face": "mouse",
    "panda face": "panda",
    "pig face": "pig",
    "pot of food": "stew",
    "poultry leg": "drumstick",
    "rabbit face": "rabbit",
    "red apple": "apple",
    "roasted sweet potato": "sweet potato",
    "sauropod": "dinosaur",
    "shamrock": "clover",
    "shortcake": "cake",
    "slice of pizza": "pizza",
    "soft ice cream": "ice cream",
    "spiral shell": "shell",
    "spouting whale": "whale",
    "steaming bowl": "ramen",
    "t-rex": "dinosaur",
    "teacup without handle": "tea",
    "tiger face": "tiger",
    "unicorn face": "unicorn",
    "wolf face": "wolf",
    "zebra face": "zebra",
}

PLAIN_NAMES: dict[str, str] = {
    **{name: name for name in _UNCHANGED.replace("\n", " ").strip().split(", ")},
    **_RENAMED,
}
"""Name in `emoji.json`, in lower case -> plain name; several pictures may share one."""

OBJECT_NAMES: tuple[str, ...] = tuple(sorted(set(PLAIN_NAMES.values())))

STYLES = ("flat", "glossy")
"""How the two sets of emoji are drawn: Noto flat, Fluent glossy."""
