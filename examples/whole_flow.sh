#!/usr/bin/env bash
# The whole flow on generated data: from exports to recommendations for every user, with a transfer and its verdict.
# Run it in an empty folder; CONFIGS is the project's folder configs. About two minutes on a CPU.
#
#   CONFIGS=~/antdist/configs bash ~/antdist/examples/whole_flow.sh
set -euo pipefail
CONFIGS="${CONFIGS:-configs}"

# What both trainings share: two modalities, one worker, everything below this folder, sizes for minutes instead of days.
settings=(data.root=data 'model.modalities=[text, price]' ray.storage=runs ray.workers=1 training.validate_every=2 training.engine=plain)

# 1. Exports. Yours come from a database; these are generated: garden has many users, kitchen few.
antdist synth exports --domains garden,kitchen --users 600 --items 150 --target-users 200 --target-items 100 --no-images

# 2. One domain for each export. What is dropped is counted and printed; bad lines go to quarantine.jsonl.
for name in garden kitchen; do
    antdist prepare "exports/$name" --domain "$name" --out data
done

# 3. Features, for all domains in one call, so that they mean the same. Without Ray, as the data are small.
antdist featurize data/garden data/kitchen --text hashed --price quantile --workers 0

# 4. Check everything that can be checked before any worker starts.
antdist verify data/kitchen
antdist validate --config "$CONFIGS/demo.yaml" 'data.domains=[garden]' "${settings[@]}"

# 5. Pre-train. Interrupted, the same command continues from the last checkpoint.
antdist pretrain --config "$CONFIGS/demo.yaml" 'data.domains=[garden]' "${settings[@]}" training.epochs=4

# 6. Adapt to kitchen: scratch, finetune and relearn, judged by a paired test over users. More seeds show smaller gains.
antdist relearn --config "$CONFIGS/demo-relearn.yaml" target=kitchen strategy=auto from=models:/demo/latest \
    'seeds=[0]' "${settings[@]}" training.epochs=4 --json result.json

# 7. The registry: versions, aliases, verdicts, lineage. `promote` moves an alias if validation says so.
antdist models
antdist promote models:/demo-relearn-kitchen/1 staging

# 8. Use the champion: measure it, ask it for one user, score all users into Parquet.
antdist evaluate models:/demo-relearn-kitchen@champion data/kitchen
user=$(zcat exports/kitchen/interactions.csv.gz | sed -n 2p | cut -d, -f1)
antdist recommend models:/demo-relearn-kitchen@champion data/kitchen --user "$user" -n 5
antdist score models:/demo-relearn-kitchen@champion data/kitchen --out scores/kitchen --top 10 --workers 0
