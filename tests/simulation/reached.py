"""What one client is told to have reached, where the numbers do not matter."""

from fedeq_edge.simulation.evaluation import AtBudget, Evaluation

EVALUATION = Evaluation(
    training=1,
    test=1,
    own=4,
    curve=(
        AtBudget(
            evaluations=4,
            consensus=0.5,
            loss=1.0,
            training_loss=1.0,
            refit=0.5,
            local=None,
            residual=1e-3,
            residual_most=1e-2,
        ),
    ),
    delivered=0.75,
    neighbour_share=None,
    trained=None,
)
