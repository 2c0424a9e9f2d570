"""The routes of OpenAI's API that generate, and those of vLLM around them: tokens in, tokens out, and prompts shown."""
