"""Steps in captured pieces between eager attentions."""
