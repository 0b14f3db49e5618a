"""What a reader has to know of the methods, in sentences."""

METHOD = (
    "The items of a task are taken as a sample of all questions that it could ask (Miller 2024, arXiv:2411.00640).",
    "Means of items that are right or wrong: Wilson's interval. Other means: Student's t. Perplexity and other ratios of sums: the"
    " delta method over documents. Items that share a text (a premise, a passage) count as one cluster; categories are no clusters.",
    "The mean over categories weighs each category alike, whatever its number of items.",
    "Comparisons pair the answers of two models to the same item. Right or wrong: McNemar's exact test, and the interval of Bonett"
    " and Price (2012), in clusters of as many items as would be independent. Other metrics, and p in clusters: paired t."
    " p (Holm) is adjusted for the number of tasks on which the two are compared; below 0.05 the second model is called better or worse.",
    "Guessing is the larger of two shares: 1 / number of choices, and that of the most frequent right answer.",
    "Calibration: the error is the mean distance between the probability of the chosen answer among the choices and how often it is"
    " right, in ten bins (Guo et al. 2017).",
)
