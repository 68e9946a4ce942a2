"""The rules teacher: questions and answers about a picture from its captions and boxes, without a language model."""
