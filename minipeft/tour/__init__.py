"""The guided tour: a book made from the source, with numbers that are computed when it is built."""
