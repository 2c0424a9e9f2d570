"""What the demo asks: short and long, prose and code, so that no two answers have the same shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """`max_tokens` bounds the answer."""

    kind: str
    text: str
    max_tokens: int


_LETTER = """Here is a letter from a customer:

"Dear Sir or Madam, three weeks ago I ordered a blue kettle and two mugs from your shop. The kettle arrived on the
second of May, well packed, and it works as it should. The mugs did not come with it. I wrote to you on the fifth and
got an automatic answer with a number, 48213, and nothing since. Yesterday a parcel came at last, but inside were two
soup bowls with somebody else's name on the invoice. I would like to send the bowls back at your cost, and I would
like either my two mugs or my eleven pounds. Please answer in person this time. Yours, Margaret Hollis"

"""

_STORY = """Read this and answer the question below.

The lighthouse on Gull Point was built in 1871 after the wreck of the Halcyon, a grain ship that had taken the lamp of
the harbour inn for the pier light. Its first keeper, Tomas Brandt, kept a diary every night for thirty-one years. He
wrote about the weather, about the ships that passed, and about the price of oil, which the harbour board thought too
high. In the winter of 1889 the lamp failed during a storm, and Brandt rang the fog bell by hand for nine hours until
his daughter Ilse came back along the causeway with a spare burner. Two fishing boats came in by the sound of the bell.
The board sent him a letter of thanks and a bill for the burner. The light was made electric in 1934, and since 1978
nobody has lived there, but the bell is still rung by hand once a year.

"""

DEMO_PROMPTS: tuple[DemoPrompt, ...] = (
    DemoPrompt("chat", "What is the capital of France, and what is it known for?", 64),
    DemoPrompt("chat", "Why is the sky blue? Explain it to a ten year old.", 96),
    DemoPrompt("code", "Write a Python function that checks whether a word is a palindrome.", 128),
    DemoPrompt("list", "Give me five ideas for a rainy Sunday afternoon.", 112),
    DemoPrompt("maths", "A train travels 60 kilometres in 45 minutes. What is its speed in kilometres per hour?", 96),
    DemoPrompt("translation", 'Translate into French: "Good morning, where is the railway station?"', 40),
    DemoPrompt("summary", _LETTER + "Summarize what the customer wants in two sentences.", 80),
    DemoPrompt("story", "Write a short story about a robot who learns to bake bread.", 160),
    DemoPrompt("chat", "What is the difference between weather and climate?", 80),
    DemoPrompt("code", "Write an SQL query for the ten customers who spent the most in 2024.", 112),
    DemoPrompt("list", "Name three primary colours.", 32),
    DemoPrompt("question", _STORY + "Why was the lighthouse built?", 64),
    DemoPrompt("poem", "Write a four line poem about the sea in winter.", 64),
    DemoPrompt("maths", "What is 17 times 6? Show your steps.", 80),
    DemoPrompt("chat", "How do I make a good cup of tea?", 96),
    DemoPrompt("translation", 'Translate into Spanish: "The library closes at six, but the garden stays open."', 40),
    DemoPrompt("code", "Explain what this does: [x * x for x in range(10) if x % 2]", 96),
    DemoPrompt("mail", _LETTER + "Write a short, friendly reply that apologizes and offers a refund.", 128),
    DemoPrompt("chat", "What should I look for when I buy a used bicycle?", 112),
    DemoPrompt("list", "List the planets of the solar system in order from the sun.", 80),
    DemoPrompt("question", _STORY + "What did the keeper do when the lamp failed?", 72),
    DemoPrompt("rewrite", 'Make this sound more polite: "Send me the report today."', 48),
    DemoPrompt("chat", "Who was Ada Lovelace?", 96),
    DemoPrompt("code", "Write a Bash one-liner that counts the lines of all .txt files in a folder.", 72),
    DemoPrompt("maths", "If a recipe for 4 people needs 300 g of flour, how much is needed for 6 people?", 80),
    DemoPrompt("story", "Tell me a joke about a cat and a computer.", 72),
    DemoPrompt("chat", "Why do leaves change their colour in autumn?", 96),
    DemoPrompt("list", "What are the pros and cons of working from home? Use bullet points.", 144),
    DemoPrompt("translation", 'Translate into German: "I would like two tickets for tomorrow, please."', 40),
    DemoPrompt("question", _STORY + "In which year was the light made electric?", 40),
    DemoPrompt("code", "Write a JavaScript function that returns the largest number in an array.", 112),
    DemoPrompt("chat", "How does a vaccine work?", 112),
    DemoPrompt("rewrite", "Fix the grammar: he go to school yesterday and forgets he book.", 40),
    DemoPrompt("chat", "Give me a packing list for three days of hiking in the mountains.", 144),
    DemoPrompt("names", "Suggest four names for a bakery that only opens at night.", 64),
    DemoPrompt("chat", "What happens when I type an address into a web browser?", 144),
    DemoPrompt("summary", _STORY + "Tell this story again in three sentences.", 96),
    DemoPrompt("maths", "Is 91 a prime number? Explain.", 72),
    DemoPrompt("chat", "How can I fall asleep more easily?", 112),
    DemoPrompt("code", "What does the HTTP status code 404 mean, and when should a server send it?", 80),
)
