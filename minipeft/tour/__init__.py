"""The guided tour, a book made from the source whose numbers are computed when it is built, and the exercises."""
