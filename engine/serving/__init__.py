"""A model over HTTP, with OpenAI's endpoints, and the page that talks to it."""
