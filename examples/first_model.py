"""A first model from Python: exports to recommendations in one process tree. Run it in an empty folder; a minute on a CPU.

Everything here is a verb of the command line as a function: `antdist.prepare` is `antdist prepare`, and so on.
"""

import antdist

SETTINGS = {
    "name": "shop",
    "target": "kitchen",
    "strategy": "scratch",  # one domain is enough for it; the others adapt a pre-trained model
    "model": {"modalities": ["text", "price"], "dim": 64, "experts": 4, "inner": 64, "initial_shift": "mean"},
    "stream": {"batch_size": 128},
    "training": {"epochs": 6, "learning_rate": 0.003, "engine": "plain"},
}


def main() -> None:
    # exports of two generated shops; of yours, name the folder that holds interactions.csv and items.csv
    antdist.synth("exports", domains=["garden", "kitchen"], users=300, items=80, with_images=False)
    prepared = antdist.prepare("exports/kitchen", domain="kitchen", out="data")
    print(prepared)
    antdist.featurize("data/kitchen", text="hashed", price="quantile", workers=0)

    # one trial: train, choose the epoch on validation users, test once, register
    adapted = antdist.adapt(SETTINGS)
    print(adapted)
    print(adapted.to_frame().to_string())

    # the registered model, with the catalogue that it was registered with: no data, no Ray
    model = antdist.load("models:/shop-kitchen@champion")
    history = list(model.item_ids[:3])
    recommended = model.recommend([history], n=5)
    print(recommended)
    users, items = model.embed_users([history]), model.embed_items(recommended.items[0])
    print("vectors of users", users.shape, "and items", items.shape)

    # a mistake is an exception that says where, what and what to do
    try:
        antdist.adapt(SETTINGS | {"targett": "garden"})
    except antdist.UserError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
